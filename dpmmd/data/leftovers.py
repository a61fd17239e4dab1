"""Files and folders that machines leave among images, and what they call their copies.

Every rule here reads the name of one entry, or its path, and nothing else. So whether a file is a
record depends on that file alone, and an exchange of one image can neither add nor remove another
record. A rule that looked at the neighbours of a file ("x (1).png is a copy if x.png is there")
would not have this property. `family_of` drops nothing: it says which files are compared, and what
a comparison may do is said where files are compared (`dpmmd.data.folder`, `dpmmd.data.once`).
"""

from __future__ import annotations

import functools
import os
import re
import unicodedata
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
# What file managers call a copy, in the languages that set the word off from the name, and in those
# that do not.
_WORDS = [
    "copy", "copie", "copia", "copía", "cópia", "kopie", "kopia", "kópia", "kopi", "kopya",
    "kopija", "kopio", "koopia", "salinan", "másolat", "копия", "копія", "копие", "копија",
    "αντίγραφο", "نسخة", "עותק",
]  # fmt: skip
_JOINED = ["コピー", "副本", "拷贝", "拷貝", "复制", "複製", "复件", "복사본", "사본", "สำเนา"]


def _folded(name: str) -> str:
    """The name as a file system that ignores case and Unicode's forms compares it."""
    return name.lower() if name.isascii() else unicodedata.normalize("NFKC", name).casefold()


def _one_of(words: list[str]) -> str:
    return "(?:" + "|".join(_folded(word) for word in words) + ")"


_APART = r"[ \-\u2013\u2014_.~]"
_NUMBER = r"(?: ?\(?\d{1,3}\)?)?"
_LIKELY = re.compile(r"[ck]oo?p|salinan")  # in names of ASCII, which most are
_COPIES = tuple(
    re.compile(pattern)
    for pattern in (
        rf"{_one_of(_WORDS + _JOINED)}(?: \(\d{{1,3}}\))?{_APART}+"
        rf"(?:(?:of|von|van|de|di|av|af|z){_APART}+)?(?P<stem>.+)",
        rf"(?P<stem>.+?){_APART}+{_one_of(_WORDS)}{_NUMBER}",
        rf"(?P<stem>.+?){_APART}*\((?:another |\d+(?:st|nd|rd|th) )?{_one_of(_WORDS)}{_NUMBER}\)",
        rf"(?P<stem>.+?){_APART}*[の的]?{_APART}*\(?{_one_of(_JOINED)}{_NUMBER}\)?",
    )
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


def family_of(path: str) -> str:
    """The path without extension and the marks of copies in its parts: a function of `path` alone.

    ``x.png``, ``X.JPG``, ``x - Copy.png``, ``x copy 2.png``, ``Copy of x.png``, ``x (1).png``,
    ``x 2.png`` are one family, and so are ``day/x.png``, ``day - Copy/x.png``, ``day (2)/x.png``.
    Names of originals can be in one family too (``x 1.png``, ``x 2.png``): only where files of a
    family have equal bytes are they taken for copies.
    """
    folder, separator, name = path.rpartition(os.sep)
    return _folder(folder) + separator + _original(os.path.splitext(name)[0])


@functools.lru_cache(1 << 10)
def _folder(path: str) -> str:
    return os.sep.join(map(_original, path.split(os.sep)))


def _original(name: str) -> str:
    found: str | None = _folded(name)
    while found is not None:
        name, found = found, _shorter(found)
    return name


def _shorter(name: str) -> str | None:
    """The folded name without its last mark of a copy; None where it has none."""
    patterns: tuple[re.Pattern[str], ...] = ()
    if not name.isascii() or _LIKELY.search(name):
        patterns = _COPIES
    if " " in name or "(" in name:
        patterns = (*patterns, _NUMBERED)
    return next((m["stem"] for pattern in patterns if (m := pattern.fullmatch(name))), None)


def listed(names: list[str] | tuple[str, ...], limit: int = 20) -> str:
    """Names for a message to the data holder, with control characters escaped."""
    shown = ", ".join(repr(name)[1:-1] for name in names[:limit])
    return shown + (f" and {len(names) - limit} others" if len(names) > limit else "")


def described(counts: Mapping[str, int]) -> str:
    """``3 x hidden; 1 x extension .txt``, the most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return "; ".join(f"{count} x {listed([reason])}" for reason, count in ordered)
