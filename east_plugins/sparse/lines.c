/* DyReLU of tensors of layout [channel][position][image]: means over positions, and the larger of two lines,
 * max(a1 x + b1, a2 x + b2), with its gradients. The lines come from numbers d of layout [4][channel][image]:
 * a1 = 1 + beta d0, a2 = beta d1, b1 = beta d2 / 2, b2 = beta d3 / 2. Compile with -DREAL=float or double.
 */
#include <stddef.h>
#include <stdint.h>

enum { WIDTH = 256, RUN = 32 }; /* images at a time; positions summed before they go to double */

typedef struct {
    int channels;
    ptrdiff_t positions, images;
    ptrdiff_t all;     /* channels of the lines and means */
    const int64_t *at; /* which of those each channel is */
    double beta;
} Sizes;

typedef struct {
    REAL a1[WIDTH], a2[WIDTH], b1[WIDTH], b2[WIDTH];
} Lines;

static ptrdiff_t width_from(const Sizes *s, ptrdiff_t first)
{
    return s->images - first < WIDTH ? s->images - first : WIDTH;
}

/* Those of a channel for the images from `first` on. */
static void lines_of(const Sizes *s, const REAL *d, int c, ptrdiff_t first, Lines *lines)
{
    const ptrdiff_t part = s->all * s->images, width = width_from(s, first);
    const REAL beta = (REAL)s->beta, half = (REAL)0.5 * beta;
    d += s->at[c] * s->images + first;
    for (ptrdiff_t n = 0; n < width; n++) {
        lines->a1[n] = 1 + beta * d[n];
        lines->a2[n] = beta * d[part + n];
        lines->b1[n] = half * d[2 * part + n];
        lines->b2[n] = half * d[3 * part + n];
    }
}

/* means [channel][image] over positions. */
void position_means(const Sizes *s, const REAL *x, REAL *means)
{
    const ptrdiff_t images = s->images;
#pragma omp parallel for schedule(dynamic)
    for (int c = 0; c < s->channels; c++)
        for (ptrdiff_t first = 0; first < images; first += WIDTH) {
            const ptrdiff_t width = width_from(s, first);
            double total[WIDTH];
            for (ptrdiff_t n = 0; n < width; n++)
                total[n] = 0;
            for (ptrdiff_t begin = 0; begin < s->positions; begin += RUN) {
                const ptrdiff_t end = s->positions - begin < RUN ? s->positions : begin + RUN;
                REAL part[WIDTH];
                for (ptrdiff_t n = 0; n < width; n++)
                    part[n] = 0;
                for (ptrdiff_t p = begin; p < end; p++)
                    for (ptrdiff_t n = 0; n < width; n++)
                        part[n] += x[(c * s->positions + p) * images + first + n];
                for (ptrdiff_t n = 0; n < width; n++)
                    total[n] += part[n];
            }
            for (ptrdiff_t n = 0; n < width; n++)
                means[s->at[c] * images + first + n] = (REAL)(total[n] / (double)s->positions);
        }
}

/* Adds the gradient of an input's means to the input's. */
void position_means_backward(const Sizes *s, const REAL *grad_means, REAL *grad_x)
{
    const ptrdiff_t images = s->images;
    const REAL share = (REAL)(1 / (double)s->positions);
#pragma omp parallel for schedule(dynamic)
    for (int c = 0; c < s->channels; c++)
        for (ptrdiff_t p = 0; p < s->positions; p++) {
            const REAL *from = grad_means + s->at[c] * images;
            REAL *to = grad_x + (c * s->positions + p) * images;
#pragma omp simd
            for (ptrdiff_t n = 0; n < images; n++)
                to[n] += share * from[n];
        }
}

void lines_forward(const Sizes *s, const REAL *x, const REAL *d, REAL *restrict y)
{
    const ptrdiff_t images = s->images;
#pragma omp parallel for schedule(dynamic)
    for (int c = 0; c < s->channels; c++)
        for (ptrdiff_t first = 0; first < images; first += WIDTH) {
            const ptrdiff_t width = width_from(s, first);
            Lines l;
            lines_of(s, d, c, first, &l);
            for (ptrdiff_t p = 0; p < s->positions; p++) {
                const ptrdiff_t at = (c * s->positions + p) * images + first;
#pragma omp simd
                for (ptrdiff_t n = 0; n < width; n++) {
                    const REAL v = x[at + n], one = l.a1[n] * v + l.b1[n], two = l.a2[n] * v + l.b2[n];
                    y[at + n] = one > two ? one : two;
                }
            }
        }
}

/* Gradients of x and d. Where both lines meet, each gets half of the gradient, as in torch.maximum. */
void lines_backward(const Sizes *s, const REAL *x, const REAL *d, const REAL *grad, REAL *restrict grad_x, REAL *grad_d)
{
    const ptrdiff_t images = s->images;
    const double beta = s->beta, of_d[4] = {beta, beta, 0.5 * beta, 0.5 * beta};
#pragma omp parallel for schedule(dynamic)
    for (int c = 0; c < s->channels; c++)
        for (ptrdiff_t first = 0; first < images; first += WIDTH) {
            const ptrdiff_t width = width_from(s, first);
            double total[4][WIDTH];
            Lines l;
            lines_of(s, d, c, first, &l);
            for (int k = 0; k < 4; k++)
                for (ptrdiff_t n = 0; n < width; n++)
                    total[k][n] = 0;
            for (ptrdiff_t begin = 0; begin < s->positions; begin += RUN) {
                const ptrdiff_t end = s->positions - begin < RUN ? s->positions : begin + RUN;
                REAL part[4][WIDTH];
                for (int k = 0; k < 4; k++)
                    for (ptrdiff_t n = 0; n < width; n++)
                        part[k][n] = 0;
                for (ptrdiff_t p = begin; p < end; p++) {
                    const ptrdiff_t at = (c * s->positions + p) * images + first;
#pragma omp simd
                    for (ptrdiff_t n = 0; n < width; n++) {
                        const REAL v = x[at + n], g = grad[at + n];
                        const REAL one = l.a1[n] * v + l.b1[n], two = l.a2[n] * v + l.b2[n];
                        const REAL share = (REAL)0.5 * (REAL)((one > two) + (one >= two));
                        const REAL upper = share * g, lower = g - upper;
                        grad_x[at + n] = upper * l.a1[n] + lower * l.a2[n];
                        part[0][n] += upper * v;
                        part[1][n] += lower * v;
                        part[2][n] += upper;
                        part[3][n] += lower;
                    }
                }
                for (int k = 0; k < 4; k++)
                    for (ptrdiff_t n = 0; n < width; n++)
                        total[k][n] += part[k][n];
            }
            for (int k = 0; k < 4; k++)
                for (ptrdiff_t n = 0; n < width; n++)
                    grad_d[(k * s->all + s->at[c]) * images + first + n] = (REAL)(of_d[k] * total[k][n]);
        }
}
