/* Batch norm of tensors of layout [channel][position]: a channel's numbers lie side by side.
 *
 * Statistics are taken over blocks that fit the first-level cache, each with its own mean, and merged in double
 * (Chan et al. 1983), so that one pass over memory is enough and nothing cancels. Compile with -DREAL=float or double.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>

typedef REAL vec __attribute__((vector_size(32), aligned(sizeof(REAL)), may_alias));
typedef __typeof__((vec){0} < (vec){0}) bits;
enum { LANES = 32 / sizeof(REAL), WIDE = 4, BLOCK = 4096 };

static inline const vec *wide(const REAL *x) { return (const vec *)x; }

/* Sum of (a - shift) * (b - shift2) over n numbers; b NULL for a factor of one. */
static inline __attribute__((always_inline)) double sum(
    const REAL *a, REAL shift, const REAL *b, REAL shift2, ptrdiff_t n)
{
    vec part[WIDE] = {0};
    ptrdiff_t i = 0;
    for (; i + WIDE * LANES <= n; i += WIDE * LANES)
        for (int v = 0; v < WIDE; v++) {
            vec term = wide(a + i)[v] - shift;
            if (b)
                term *= wide(b + i)[v] - shift2;
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

/* A norm of `channels` channels of n numbers each. Channel c is number at[c] of weight, bias (both may be NULL) and the
 * running statistics; `at` NULL: number c. With `relu` and `residual` y is relu(norm + residual); either may be absent.
 * The running statistics, unless NULL, move by `share` towards those of the batch, in which each number stands for
 * `each`; those of the first `size` channels are taken to be zero there at first. */
typedef struct {
    ptrdiff_t channels, n, size, each;
    const int64_t *at;
    const REAL *weight, *bias;
    REAL *running_mean, *running_var;
    double eps, share;
    int relu;
} Norm;

static inline ptrdiff_t number(const Norm *p, ptrdiff_t c) { return p->at ? p->at[c] : c; }

static inline __attribute__((always_inline)) void apply(
    const REAL *in, ptrdiff_t n, REAL centre, REAL a, REAL b, const REAL *residual, REAL *out, const int relu)
{
    ptrdiff_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        vec y = (*wide(in + i) - centre) * a + b;
        if (residual)
            y += *wide(residual + i);
        if (relu)
            y = (vec)((bits)y & ~(y < 0)); /* a NaN stays one */
        *(vec *)(out + i) = y;
    }
    for (; i < n; i++) {
        REAL y = (in[i] - centre) * a + b;
        if (residual)
            y += residual[i];
        out[i] = relu && y < 0 ? 0 : y;
    }
}

/* Rounded before it is added, as PyTorch's operations do. */
static REAL rounded(volatile REAL x) { return x; }

/* Channels that the batch has not are zero there. */
static void track(const Norm *p, const double *mean, const double *variance)
{
    const REAL take = (REAL)p->share, keep = (REAL)(1 - p->share);
    const ptrdiff_t n = p->n * p->each;
    const double unbiased = n > 1 ? (double)n / (double)(n - 1) : (double)n;
    for (ptrdiff_t i = 0; i < p->size; i++) {
        p->running_mean[i] *= keep;
        p->running_var[i] *= keep;
    }
    for (ptrdiff_t c = 0; c < p->channels; c++) {
        p->running_mean[number(p, c)] += rounded(take * (REAL)mean[c]);
        p->running_var[number(p, c)] += rounded(take * (REAL)(variance[c] * unbiased));
    }
}

/* y = relu(weight (x - mean) / sqrt(variance + eps) + bias + residual). `found`: mean and then biased variance of each
 * channel. */
void norm_forward(const Norm *p, const REAL *x, const REAL *residual, REAL *y, double *found)
{
    double *mean = found, *variance = found + p->channels;
    const ptrdiff_t n = p->n;
#pragma omp parallel for schedule(dynamic)
    for (ptrdiff_t c = 0; c < p->channels; c++) {
        const REAL *in = x + c * n, *other = residual ? residual + c * n : NULL;
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
        const double scale = (p->weight ? (double)p->weight[number(p, c)] : 1) / sqrt(variance[c] + p->eps);
        const double shift = p->bias ? (double)p->bias[number(p, c)] : 0;
        const REAL centre = (REAL)m, a = (REAL)scale, b = (REAL)(shift + ((double)centre - m) * scale);
        if (p->relu)
            apply(in, n, centre, a, b, other, y + c * n, 1);
        else
            apply(in, n, centre, a, b, other, y + c * n, 0);
    }
    if (p->running_mean)
        track(p, mean, variance);
}

/* Gradients of the input, residual, weight and bias (the latter three may be NULL), from that of the output y. */
void norm_backward(const Norm *p, const REAL *x, const REAL *y, const double *found, const REAL *grad, REAL *grad_x,
                   REAL *grad_residual, REAL *grad_weight, REAL *grad_bias)
{
    const double *mean = found, *variance = found + p->channels;
    const ptrdiff_t n = p->n;
#pragma omp parallel for schedule(dynamic)
    for (ptrdiff_t c = 0; c < p->channels; c++) {
        const REAL *in = x + c * n, *g = grad + c * n;
        REAL *out = grad_x + c * n;
        if (p->relu) { /* to where it is wanted, or to be overwritten */
            const REAL *of = y + c * n;
            REAL *passed = grad_residual ? grad_residual + c * n : out;
            for (ptrdiff_t i = 0; i < n; i++)
                passed[i] = of[i] <= 0 ? 0 : g[i];
            g = passed;
        }
        const REAL centre = (REAL)mean[c];
        double total = 0, product = 0;
        for (ptrdiff_t i = 0; i < n; i += BLOCK) {
            const ptrdiff_t count = n - i < BLOCK ? n - i : BLOCK;
            total += sum(g + i, 0, NULL, 0, count);
            product += sum(g + i, 0, in + i, centre, count);
        }
        product += ((double)centre - mean[c]) * total;
        const double inverse = 1 / sqrt(variance[c] + p->eps);
        if (grad_weight)
            grad_weight[number(p, c)] = (REAL)(product * inverse);
        if (grad_bias)
            grad_bias[number(p, c)] = (REAL)total;
        const double scale = (p->weight ? (double)p->weight[number(p, c)] : 1) * inverse;
        const double slope = -scale * inverse * inverse * product / (double)n;
        const REAL a = (REAL)scale, b = (REAL)slope;
        const REAL shift = (REAL)(-scale * total / (double)n + ((double)centre - mean[c]) * slope);
        ptrdiff_t i = 0;
        for (; i + LANES <= n; i += LANES)
            *(vec *)(out + i) = *wide(g + i) * a + (*wide(in + i) - centre) * b + shift;
        for (; i < n; i++)
            out[i] = g[i] * a + (in[i] - centre) * b + shift;
    }
}
