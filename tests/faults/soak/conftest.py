"""The row of the matrix that needs time rather than faults."""

from faults.matrix import ROWS

ROWS |= {21: "load and soak"}
