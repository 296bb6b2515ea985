"""A `main` for the exported C file that classifies an image."""

from __future__ import annotations

from .c import CFile

TEMPLATE = """
#ifdef {macro}_MAIN /* with it: a program that reads a {width} x {height} image, binary {kind}, and prints its class */
#include <stdio.h>

/* The next number of the image's header; comments, from # to the end of the line, are left out. */
static int header_number(void)
{{
    int c = getchar(), number = 0;
    while (c == ' ' || c == '#' || (c >= '\\t' && c <= '\\r')) {{
        if (c == '#')
            while (c != '\\n' && c != EOF)
                c = getchar();
        c = getchar();
    }}
    if (c < '0' || c > '9')
        return -1;
    for (; c >= '0' && c <= '9' && number < 100000; c = getchar())
        number = 10 * number + c - '0';
    return number;
}}

int main(void)
{{
    static unsigned char pixels[{size}][{channels}];
    static float input[{channels}][{size}], output[{classes}];
    int best = 0;
    if (getchar() != '{magic[0]}' || getchar() != '{magic[1]}' || header_number() != {width}
        || header_number() != {height} || header_number() != 255 || fread(pixels, sizeof pixels, 1, stdin) != 1) {{
        fputs("expected a {width} x {height} image as binary {kind} on the standard input\\n", stderr);
        return 2;
    }}
    for (int c = 0; c < {channels}; c++)
        for (int i = 0; i < {size}; i++)
            input[c][i] = ((float)pixels[i][c] - {name}_mean[c]) / {name}_deviation[c];
    {name}_run(input[0], output);
    for (int k = 1; k < {classes}; k++)
        best = output[k] > output[best] ? k : best;
    printf("class %d of {classes}, score %g, label %s\\n", best, (double)output[best], {name}_labels[best]);
    return 0;
}}
#endif
"""


def image_program(file: CFile) -> str:
    """C text to follow that of `file`, made with an interface: compiled with -DNAME_MAIN (in capitals) it is a program
    that classifies a PPM or, for one channel, PGM image of the network's size. Empty where inputs are no such images.
    """
    if len(file.input_shape) != 3 or file.input_shape[0] not in (1, 3) or len(file.output_shape) != 1:
        return ""
    channels, height, width = file.input_shape
    magic, kind = ("P6", "PPM") if channels == 3 else ("P5", "PGM")
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
    )
