"""The catalogue: files that somebody might be given, and what must come of each."""

from hostile import bomb_cases, pickle_cases, safetensors_cases, tensor_cases, zip_cases
from hostile.case import Case

TORCH: list[Case] = [
    *zip_cases.CASES,
    *pickle_cases.CASES,
    *bomb_cases.CASES,
    *tensor_cases.CASES,
]
SAFETENSORS: list[Case] = safetensors_cases.CASES
