/* Batch norm of tensors of layout [channel][position]: a channel's numbers lie side by side.
 *
 * Statistics are taken over blocks that fit the first-level cache, each with its own mean, and merged in double
 * (Chan et al. 1983), so that one pass over memory is enough and nothing cancels. Compile with -DREAL=float or double.
 */
#include <math.h>
#include <stddef.h>

typedef REAL vec __attribute__((vector_size(32), aligned(sizeof(REAL)), may_alias));
enum { LANES = 32 / sizeof(REAL), WIDE = 4, BLOCK = 4096 };

static inline const vec *at(const REAL *x) { return (const vec *)x; }

/* Sum of (a - shift) * (b - shift2) over n numbers; b NULL for a factor of one. */
static inline __attribute__((always_inline)) double sum(
    const REAL *a, REAL shift, const REAL *b, REAL shift2, ptrdiff_t n)
{
    vec part[WIDE] = {0};
    ptrdiff_t i = 0;
    for (; i + WIDE * LANES <= n; i += WIDE * LANES)
        for (int v = 0; v < WIDE; v++) {
            vec term = at(a + i)[v] - shift;
            if (b)
                term *= at(b + i)[v] - shift2;
            part[v] += term;
        }
    double total = 0;
    for (int v = 0; v < WIDE; v++)
        for (int l = 0; l < LANES; l++)
            total += (double)part[v][l];
    for (; i < n; i++)
        total += (double)((a[i] - shift) * (b ? b[i] - shift2 : 1));
    return total;
}

/* y = weight (x - mean) / sqrt(variance + eps) + bias, mean and biased variance of each channel of n numbers. */
void norm_forward(int channels, ptrdiff_t n, const REAL *x, const REAL *weight, const REAL *bias, double eps, REAL *y,
                  double *mean, double *variance)
{
#pragma omp parallel for schedule(dynamic)
    for (int c = 0; c < channels; c++) {
        const REAL *in = x + c * n;
        REAL *out = y + c * n;
        double m = 0, squares = 0;
        for (ptrdiff_t i = 0; i < n; i += BLOCK) {
            const ptrdiff_t count = n - i < BLOCK ? n - i : BLOCK;
            const REAL centre = (REAL)(sum(in + i, 0, NULL, 0, count) / (double)count);
            const double rest = sum(in + i, centre, NULL, 0, count) / (double)count, block = centre + rest;
            squares += sum(in + i, centre, in + i, centre, count) - rest * rest * (double)count;
            squares += (block - m) * (block - m) * (double)i * (double)count / (double)(i + count);
            m += (block - m) * (double)count / (double)(i + count);
        }
        mean[c] = m;
        variance[c] = squares / (double)n;
        const double scale = (weight ? (double)weight[c] : 1) / sqrt(variance[c] + eps);
        const REAL centre = (REAL)m, a = (REAL)scale;
        const REAL b = (REAL)((bias ? (double)bias[c] : 0) + ((double)centre - m) * scale);
        ptrdiff_t i = 0;
        for (; i + LANES <= n; i += LANES)
            *(vec *)(out + i) = (*at(in + i) - centre) * a + b;
        for (; i < n; i++)
            out[i] = (in[i] - centre) * a + b;
    }
}

/* Gradients of the input, weight and bias (the latter two may be NULL), from that of the output. */
void norm_backward(int channels, ptrdiff_t n, const REAL *x, const REAL *weight, const double *mean,
                   const double *variance, double eps, const REAL *grad, REAL *grad_x, REAL *grad_weight, REAL *grad_bias)
{
#pragma omp parallel for schedule(dynamic)
    for (int c = 0; c < channels; c++) {
        const REAL *in = x + c * n, *g = grad + c * n;
        REAL *out = grad_x + c * n;
        const REAL centre = (REAL)mean[c];
        double total = 0, product = 0;
        for (ptrdiff_t i = 0; i < n; i += BLOCK) {
            const ptrdiff_t count = n - i < BLOCK ? n - i : BLOCK;
            total += sum(g + i, 0, NULL, 0, count);
            product += sum(g + i, 0, in + i, centre, count);
        }
        product += ((double)centre - mean[c]) * total;
        const double inverse = 1 / sqrt(variance[c] + eps);
        if (grad_weight)
            grad_weight[c] = (REAL)(product * inverse);
        if (grad_bias)
            grad_bias[c] = (REAL)total;
        const double scale = (weight ? (double)weight[c] : 1) * inverse;
        const double slope = -scale * inverse * inverse * product / (double)n;
        const REAL a = (REAL)scale, b = (REAL)slope;
        const REAL shift = (REAL)(-scale * total / (double)n + ((double)centre - mean[c]) * slope);
        ptrdiff_t i = 0;
        for (; i + LANES <= n; i += LANES)
            *(vec *)(out + i) = *at(g + i) * a + (*at(in + i) - centre) * b + shift;
        for (; i < n; i++)
            out[i] = g[i] * a + (in[i] - centre) * b + shift;
    }
}
