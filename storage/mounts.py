"""Which kind of file system a path lies on, so that ``io="auto"`` can keep away from mapping files over a network."""

import re
from pathlib import Path

# Page faults over a network fetch a page or a read-ahead window each: 30-50x slower than large reads (ComfyUI 2288).
_NETWORK_TYPES = frozenset(
    {
        *("9p", "afs", "beegfs", "ceph", "cifs", "glusterfs", "gpfs", "lustre", "nfs", "nfs4"),
        *("orangefs", "panfs", "smb3", "smbfs", "virtiofs", "wekafs"),
    }
)


def is_network_path(path: Path, mountinfo: Path = Path("/proc/self/mountinfo")) -> bool:
    """Whether the path lies on a network or FUSE file system; False where the system does not say."""
    try:
        lines = mountinfo.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return False
    return is_network_type(find_type(path.resolve(), lines))


def is_network_type(kind: str) -> bool:
    """Whether files of that file system are fetched by a server or by a user process (fuseblk is a local disk)."""
    return kind in _NETWORK_TYPES or kind == "fuse" or kind.startswith("fuse.")


def find_type(path: Path, lines: list[str]) -> str:
    """The type of the file system with the longest mount point above an absolute path; the last mount of it counts."""
    best, kind = -1, ""
    for line in lines:
        fields, separator, tail = line.partition(" - ")
        columns = fields.split(" ")
        if not separator or len(columns) < 5:
            continue
        mount = Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), columns[4]))
        if path.is_relative_to(mount) and len(mount.parts) >= best:
            best, kind = len(mount.parts), tail.split(" ")[0]
    return kind
