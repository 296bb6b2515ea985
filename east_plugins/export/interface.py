"""What a device needs to know beside the network: how an image becomes the input, and what the outputs are called."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

LAYOUT = "channel, row, column"


@dataclass(frozen=True)
class Interface:
    """Input = (value - mean) / deviation, by channel, of values 0 to 255, in the order channel, row, column; one label
    for each output."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    labels: tuple[str, ...]

    def metadata(self) -> dict[str, str]:
        """For an ONNX file."""
        return {
            "input_layout": f"batch, {LAYOUT}",
            "input_values": "(value - mean) / deviation, value from 0 to 255",
            "mean": json.dumps(list(self.mean)),
            "deviation": json.dumps(list(self.deviation)),
            "labels": json.dumps(list(self.labels)),
        }

    def in_c(self, name: str) -> str:
        """Constants for a C file: NAME_mean, NAME_deviation and NAME_labels, declared and defined."""
        channels, outputs = len(self.mean), len(self.labels)
        values = [
            (f"const float {name}_mean[{channels}]", _floats(self.mean)),
            (f"const float {name}_deviation[{channels}]", _floats(self.deviation)),
            (f"const char *const {name}_labels[{outputs}]", ",\n    ".join(map(_text, self.labels))),
        ]
        lines = [f"/* Input: {LAYOUT}; (value - mean) / deviation, by channel, of values from 0 to 255. */"]
        lines += [f"extern {declaration};" for declaration, _ in values]
        lines += [f"{declaration} = {{\n    {content}\n}};" for declaration, content in values]
        return "\n".join(lines) + "\n"


def _floats(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.9g}" for value in values)


def _text(label: str) -> str:
    """A C string literal, bytes that are not plain in octal: a digit behind three of them is no part of them."""
    plain = (chr(byte) if 32 <= byte < 127 and byte not in b'"\\?' else f"\\{byte:03o}" for byte in label.encode())
    return '"' + "".join(plain) + '"'
