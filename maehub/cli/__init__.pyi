from .command_line import COMMANDS as COMMANDS
from .command_line import main as main
