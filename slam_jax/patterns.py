"""Slash paths chosen by patterns, such as `decoder/layers/*/attention`."""

import difflib
import fnmatch
from collections.abc import Collection, Sequence

from slam_jax.errors import ConfigError, shorten


def matching(
    names: Collection[str], patterns: Sequence[str], field: str, kind: str = "parameter"
) -> set[str]:
    """The names that one of the patterns matches, or that are below a path that it matches.

    `*` matches any text, with slashes. field: that has the patterns. kind: what the names are of.

    Raises ConfigError for a pattern that matches nothing, with similar paths.
    """
    found: set[str] = set()
    for pattern in patterns:
        own = {
            x
            for x in names
            if any(fnmatch.fnmatchcase(x, each) for each in (pattern, f"{pattern}/*"))
        }
        if not own:
            raise ConfigError(
                f"{field} has the pattern {shorten(repr(pattern), 120)}, which matches no "
                f"{kind}; {_near(names, pattern)}"
            )
        found |= own
    return found


def _near(names: Collection[str], pattern: str) -> str:
    """What the writer of the pattern may have meant."""
    wanted = pattern.rstrip("/*")
    known = {name.rsplit("/", i)[0] for name in names for i in range(name.count("/") + 1)}
    # "image/*" means "streams/image"; a whole path would be too different to be similar.
    ends = sorted(path for path in known if path.endswith(f"/{wanted}"))
    near = ends or difflib.get_close_matches(wanted, sorted(known), n=3)
    if near:
        return f"did you mean {' or '.join(map(repr, near[:3]))}?"
    return f"paths begin with {', '.join(sorted({name.split('/')[0] for name in names}))}"
