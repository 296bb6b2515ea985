"""A `main` for the exported C file that classifies an image."""

from __future__ import annotations

from torch import Tensor

from .c import CFile

TEMPLATE = """
#ifdef {macro}_MAIN /* with it: a program that reads a {width} x {height} image, binary {kind}, and prints its class */
#include <stdio.h>

int main(void)
{{
    static const float mean[{channels}] = {{{mean}}}, deviation[{channels}] = {{{deviation}}};
    static unsigned char pixels[{size}][{channels}];
    static float input[{channels}][{size}], output[{classes}];
    int width, height, best = 0;
    if (scanf("{magic} %d %d 255", &width, &height) != 2 || width != {width} || height != {height} || getchar() == EOF
        || fread(pixels, sizeof pixels, 1, stdin) != 1) {{
        fputs("expected a {width} x {height} image as binary {kind} on the standard input\\n", stderr);
        return 2;
    }}
    for (int c = 0; c < {channels}; c++)
        for (int i = 0; i < {size}; i++)
            input[c][i] = ((float)pixels[i][c] - mean[c]) / deviation[c];
    {name}_run(input[0], output);
    for (int k = 1; k < {classes}; k++)
        best = output[k] > output[best] ? k : best;
    printf("class %d of {classes}, score %g\\n", best, (double)output[best]);
    return 0;
}}
#endif
"""


def image_program(file: CFile, mean: Tensor, deviation: Tensor) -> str:
    """C text to follow that of `file`: compiled with -DNAME_MAIN (in capitals) it is a program that classifies a PPM
    or, for one channel, PGM image of the network's size. `mean` and `deviation` (of values 0 to 255, a number a
    channel) are what the network's inputs were normalised by. Empty where inputs are no such images.
    """
    if len(file.input_shape) != 3 or file.input_shape[0] not in (1, 3) or len(file.output_shape) != 1:
        return ""
    channels, height, width = file.input_shape
    magic, kind = ("P6", "PPM") if channels == 3 else ("P5", "PGM")
    numbers = (", ".join(f"{value:.9g}" for value in tensor.flatten().tolist()) for tensor in (mean, deviation))
    return TEMPLATE.format(
        macro=file.name.upper(),
        name=file.name,
        width=width,
        height=height,
        size=width * height,
        channels=channels,
        classes=file.output_shape[0],
        magic=magic,
        kind=kind,
        mean=next(numbers),
        deviation=next(numbers),
    )
