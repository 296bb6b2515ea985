/* What DyReLU does with tensors of layout [channel][position][image]: sums over positions, and the larger of two lines,
 * max(a1 x + b1, a2 x + b2), with coefficients [channel][image], and its gradients. Compile with -DREAL=float or double.
 */
#include <stddef.h>

enum { WIDTH = 256, RUN = 32 }; /* images at a time; positions summed before they go to double */

typedef struct {
    int channels;
    ptrdiff_t positions, images;
} Sizes;

/* sums [channel][image] over positions. */
void position_sums(const Sizes *s, const REAL *x, REAL *sums)
{
    const ptrdiff_t images = s->images;
#pragma omp parallel for schedule(dynamic)
    for (int c = 0; c < s->channels; c++)
        for (ptrdiff_t first = 0; first < images; first += WIDTH) {
            const ptrdiff_t width = images - first < WIDTH ? images - first : WIDTH;
            double total[WIDTH] = {0};
            for (ptrdiff_t begin = 0; begin < s->positions; begin += RUN) {
                const ptrdiff_t end = s->positions - begin < RUN ? s->positions : begin + RUN;
                REAL part[WIDTH] = {0};
                for (ptrdiff_t p = begin; p < end; p++)
                    for (ptrdiff_t n = 0; n < width; n++)
                        part[n] += x[(c * s->positions + p) * images + first + n];
                for (ptrdiff_t n = 0; n < width; n++)
                    total[n] += part[n];
            }
            for (ptrdiff_t n = 0; n < width; n++)
                sums[c * images + first + n] = (REAL)total[n];
        }
}

void lines_forward(const Sizes *s, const REAL *x, const REAL *a1, const REAL *b1, const REAL *a2, const REAL *b2, REAL *restrict y)
{
    const ptrdiff_t images = s->images;
#pragma omp parallel for schedule(dynamic)
    for (int c = 0; c < s->channels; c++) {
        const REAL *p1 = a1 + c * images, *q1 = b1 + c * images, *p2 = a2 + c * images, *q2 = b2 + c * images;
        for (ptrdiff_t p = 0; p < s->positions; p++) {
            const ptrdiff_t at = (c * s->positions + p) * images;
#pragma omp simd
            for (ptrdiff_t n = 0; n < images; n++) {
                const REAL v = x[at + n], one = p1[n] * v + q1[n], two = p2[n] * v + q2[n];
                y[at + n] = one > two ? one : two;
            }
        }
    }
}

/* Where both lines meet, each gets half of the gradient, as in torch.maximum. */
void lines_backward(const Sizes *s, const REAL *x, const REAL *a1, const REAL *b1, const REAL *a2, const REAL *b2,
                    const REAL *grad, REAL *restrict grad_x, REAL *grad_a1, REAL *grad_b1, REAL *grad_a2, REAL *grad_b2)
{
    const ptrdiff_t images = s->images;
#pragma omp parallel for schedule(dynamic)
    for (int c = 0; c < s->channels; c++)
        for (ptrdiff_t first = 0; first < images; first += WIDTH) {
            const ptrdiff_t width = images - first < WIDTH ? images - first : WIDTH, of = c * images + first;
            double total[4][WIDTH] = {{0}};
            for (ptrdiff_t begin = 0; begin < s->positions; begin += RUN) {
                const ptrdiff_t end = s->positions - begin < RUN ? s->positions : begin + RUN;
                REAL part[4][WIDTH] = {{0}};
                for (ptrdiff_t p = begin; p < end; p++) {
                    const ptrdiff_t at = (c * s->positions + p) * images + first;
#pragma omp simd
                    for (ptrdiff_t n = 0; n < width; n++) {
                        const REAL v = x[at + n], g = grad[at + n];
                        const REAL one = a1[of + n] * v + b1[of + n], two = a2[of + n] * v + b2[of + n];
                        const REAL share = (REAL)0.5 * (REAL)((one > two) + (one >= two));
                        const REAL upper = share * g, lower = g - upper;
                        grad_x[at + n] = upper * a1[of + n] + lower * a2[of + n];
                        part[0][n] += upper * v;
                        part[1][n] += upper;
                        part[2][n] += lower * v;
                        part[3][n] += lower;
                    }
                }
                for (int k = 0; k < 4; k++)
                    for (ptrdiff_t n = 0; n < width; n++)
                        total[k][n] += part[k][n];
            }
            for (ptrdiff_t n = 0; n < width; n++) {
                grad_a1[of + n] = (REAL)total[0][n];
                grad_b1[of + n] = (REAL)total[1][n];
                grad_a2[of + n] = (REAL)total[2][n];
                grad_b2[of + n] = (REAL)total[3][n];
            }
        }
}
