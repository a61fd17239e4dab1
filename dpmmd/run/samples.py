"""A synthetic set in files, with a picture of samples and a card."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from dpmmd import align, export
from dpmmd.devices import device_of
from dpmmd.files import write_atomically
from dpmmd.privacy import Release
from dpmmd.recipe import SampleSection
from dpmmd.train import Trained, sample, sample_grid, save_png

_FITTED = 20_000  # images that an alignment is fitted to


def write_samples(
    trained: Trained,
    path: Path,
    settings: SampleSection,
    *,
    picture: Path,
    card: Path | None = None,
    release: Release | None = None,
    moments: Release | None = None,
    format: str = "npz",
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """Writes a synthetic set (`dpmmd.export.write`), a grid of samples (PNG) and a card (Markdown).

    The card says what ``release`` promises; without it there is none. Images are aligned with the
    moments of pixels that ``moments``, if there is one, or else ``release`` holds.

    Args:
        moments: the release that the modes of ``release`` were fitted to.
        settings: how many images, and how; a plan that was trained by sets how many at a time at
            most.
    """
    at_once = min(settings.batch_size, trained.limits.generated or settings.batch_size)
    temperature, seed = settings.temperature, settings.seed
    draw = partial(
        sample,
        trained.generator,
        num_classes=trained.num_classes,
        modes=trained.modes,
        batch_size=at_once,
        temperature=temperature,
    )
    device = device_of(trained.generator)
    classes = trained.class_names
    if classes is None and release is not None:  # trained by a version that kept no names
        classes = release.metadata.class_names
    alignment, origin = None, moments or release
    if origin is not None and origin.pixels is not None:
        alignment = align.fit(origin, *draw(_FITTED, seed=seed + 1)).to(device)
    images, labels = draw(settings.num_images, alignment=alignment, seed=seed, progress=progress)
    grid = sample_grid(
        trained.generator,
        trained.num_classes,
        device,
        at_once,
        temperature=temperature,
        modes=trained.modes,
        alignment=alignment,
    )
    save_png(picture, grid)
    modes = None
    if settings.modes and trained.modes is not None:
        modes = trained.modes.modes()[trained.modes.drawn(len(images))].numpy()
    if release is not None and card is not None:
        told = export.card(
            release,
            name=path.name,
            format=format,
            shape=images.shape,
            step=trained.selected_step,
            temperature=temperature,
            seed=seed,
            aligned=alignment is not None,
            modes=modes is not None,
        )
        write_atomically(card, told.encode(), overwrite=True)
    export.write(
        path,
        images,
        labels,
        format=format,
        classes=classes,
        modes=modes,
        overwrite=overwrite,
    )
