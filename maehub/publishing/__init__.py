"""Publishing a model: `maehub.push` is in ``pushing``, which reads like the journey.

provenance  licences          what is known of the model, and what may be done with it
repository  card              the folder that is published
gate  readback  leaks         what it must pass
remote  conditions  committing    the Hub: what is there, one commit, what arrived
"""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
