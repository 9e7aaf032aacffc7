"""Compiled loops check no index: every array that they work on ends, and begins, beside memory that
nobody may touch, and a process that does touch it dies.

The processes are forked, so that their end by a signal is a failure here and not the end of all.
"""

import ctypes
import inspect
import mmap
import os
import re
import signal
import sys
import textwrap
import tracemalloc
from math import prod

import numba_blocks
import numpy as np
import pytest

import miniconvit as mc
from miniconvit.engine.processes import can_fork
