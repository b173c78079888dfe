from .planning import plan as plan
