from .pushing import Plan as Plan
from .pushing import push as push
