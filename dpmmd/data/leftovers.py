"""Files and folders that machines leave among images, and what they call their copies.

Every rule here reads the name of one entry and nothing else. So whether a file is a record depends
on that file alone, and an exchange of one image can neither add nor remove another record. A rule
that looked at the neighbours of a file ("x (1).png is a copy if x.png is there") would not have
this property: see `copy_of`, which names candidates and drops nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

HIDDEN = "hidden: the name begins with a dot"
LEFTOVER = "left by a machine, e.g. __MACOSX, Thumbs.db, @eaDir, *.bak"
CONFLICT = "a conflicted copy, made by a program that synchronises folders"
OTHER_SPLIT = "a shard of another split, or of none"
NOT_READ = "an image of a kind that is not read:"
EXTENSION = "extension "
NO_EXTENSION = "no extension"

_IMAGES_NOT_READ = re.compile(
    r"\.(heic|heif|avif|jxl|jp2|j2k|jpx|jfif|jpe|tif|tiff|tga|dcm|dicom|ima|nii|mha|mhd|nrrd|svg|eps|pdf"
    r"|psd|xcf|raw|cr2|cr3|nef|arw|dng|orf|rw2|raf|exr|hdr|dds|ico|icns|pcx|sgi|apng|svs|ndpi|mrxs|scn|czi|lif|fits)"
)
_NAMES = frozenset(
    (
        "__macosx",
        "__pycache__",
        "lost+found",
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "$recycle.bin",
        "recycler",
        "system volume information",
        "network trash folder",
        "temporary items",
        "@eadir",
        "@tmp",
        "@recycle",
        "@recently-snapshot",
        "#recycle",
        "#snapshot",
    )
)
_ENDINGS = ("~", ".tmp", ".part", ".partial", ".crdownload", ".bak", ".swp")
_CONFLICT = re.compile(
    r"\([^()]*conflicted copy[^()]*\)"  # Dropbox, Nextcloud
    r"|\.sync-conflict-\d{8}-\d{6}"  # Syncthing
    r"|_conflict-\d{8}-\d{6}"  # ownCloud
    r"|\(SFConflict [^()]*\)",  # Seafile
    re.IGNORECASE,
)
_WORD = r"(?:copy|kopie|copie|copia|cópia|kopia|kopi)"
_LIKELY = re.compile(r"[ck][oó]p", re.IGNORECASE)
_COPIES = (
    re.compile(rf"{_WORD}(?: \(\d+\))? (?:of|von|van|de|di|av|af|z) (?P<stem>.+)", re.IGNORECASE),
    re.compile(
        rf"(?P<stem>.+?)(?: - | |-|_)(?:{_WORD}(?: ?\(?\d+\)?)?"
        rf"|\((?:another |\d+(?:st|nd|rd|th) )?{_WORD}(?: \d+)?\))",
        re.IGNORECASE,
    ),
)
_NUMBERED = re.compile(r"(?P<stem>.+?) ?(?:\(\d{1,3}\)| \d{1,2})")


def leftover(name: str) -> str | None:
    """Why an entry of this name is neither an image nor a class; None where it may be one."""
    if name.startswith("."):
        return HIDDEN
    small = name.lower()
    if small in _NAMES or small.endswith(_ENDINGS) or name.startswith("~$"):
        return LEFTOVER
    if len(name) > 1 and name.startswith("#") and name.endswith("#"):
        return LEFTOVER
    return CONFLICT if _CONFLICT.search(name) else None


def other_extension(name: str) -> str:
    """The reason under which a file that is no image by its name is counted."""
    extension = os.path.splitext(name)[1].lower()
    if _IMAGES_NOT_READ.fullmatch(extension):
        return f"{NOT_READ} {extension}"
    return EXTENSION + extension if extension else NO_EXTENSION


def may_be_images(reason: str) -> bool:
    """Whether what was passed over for this reason is worth a warning."""
    expected = (HIDDEN, LEFTOVER, NO_EXTENSION, OTHER_SPLIT)
    return reason not in expected and not reason.startswith(EXTENSION)


def copy_of(name: str, *, numbered: bool = False) -> str | None:
    """The name whose copy a file manager calls `name`; None where it does not look like a copy.

    ``x - Copy.png``, ``x copy 2.png``, ``x (another copy).png`` and ``Copy of x.png`` are copies of
    ``x.png``; with `numbered` so are ``x (1).png`` and ``x 2.png``, which are names of originals
    too.
    """
    if not numbered and not _LIKELY.search(name):
        return None
    stem, extension = os.path.splitext(name)
    for pattern in (*_COPIES, *((_NUMBERED,) if numbered else ())):
        if match := pattern.fullmatch(stem):
            return match["stem"] + extension
    return None


def listed(names: list[str] | tuple[str, ...], limit: int = 20) -> str:
    """Names for a message to the data holder, with control characters escaped."""
    shown = ", ".join(repr(name)[1:-1] for name in names[:limit])
    return shown + (f" and {len(names) - limit} others" if len(names) > limit else "")


def described(counts: Mapping[str, int]) -> str:
    """``3 x hidden; 1 x extension .txt``, the most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return "; ".join(f"{count} x {listed([reason])}" for reason, count in ordered)
