"""What holds for all tests."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # --device auto is the CPU, whose bits are compared
