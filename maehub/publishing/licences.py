"""Which licence published weights get: what their base allows, and what their author says."""

import re
from dataclasses import dataclass

from maehub.errors import UsageError
from maehub.models import Origin

# Licences that let a descendant carry another one; that they ask for the author's name is kept by the card.
_OPEN = re.compile(r"apache-2\.0|mit|bsd(-[23]-clause(-clear)?)?|isc|zlib|unlicense|cc0-1\.0|pddl|cc-by-\d\.\d")
_NON_COMMERCIAL = re.compile(r"cc-by-nc-(\d\.\d)")
_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]{1,63}")


@dataclass(frozen=True)
class Licence:
    """A licence as the Hub writes it, and in words where it comes from."""

    identifier: str  # lower case, such as "cc-by-nc-4.0"
    reason: str


def settle_licence(asked: str | None, base: Origin | None) -> Licence:
    """The licence of weights that are to be published.

    Weights that were trained from others inherit their licence. Another one must be asked for, and must be one that the
    base allows: of a permissive licence any; of CC BY-NC the same, or the same with share-alike; of any other none.
    """
    wanted = asked.strip().lower() if asked else ""
    if wanted and not _IDENTIFIER.fullmatch(wanted):
        raise UsageError(f"--licence takes an identifier of the Hub, such as apache-2.0, not {asked!r:.80}")
    theirs = base.licence.strip().lower() if base else ""
    if base is None or not theirs:
        reason, how = "chosen by the author", "trained from scratch, so their licence is yours to choose: name it"
        if base:
            reason = f"stated by the author; that of {base.name} is not recorded"
            how = f"trained from {base.name}, whose licence is not recorded: look it up, and name one that it allows"
        if not wanted:
            raise UsageError(f"these weights were {how} by --licence, such as --licence apache-2.0. Nothing was sent")
        return Licence(wanted, reason)
    if not wanted or wanted == theirs:
        return Licence(theirs, f"inherited from {base.name}")
    match = _NON_COMMERCIAL.fullmatch(theirs)
    if not (_OPEN.fullmatch(theirs) or (match and wanted == f"cc-by-nc-sa-{match[1]}")):
        raise UsageError(
            f"weights trained from {base.name} inherit its licence, {base.licence}, which does not allow {wanted}: "
            "leave --licence out. Nothing was sent"
        )
    return Licence(wanted, f"chosen by the author; {base.name} is under {base.licence}")
