"""Cases import Megatron: whatever process they are imported into must be prepared first."""

from a3po_megatron import compat
from a3po_megatron.launch import environment

environment.prepare()
compat.prepare()
