/* Sparse convolution as sums over taps, for tensors of layout [channel][row][column][image].
 *
 * A tap is one active weight: (channel that is written, channel that is read, kernel row, kernel column). Images lie
 * side by side in memory, so that every tap is a run of multiply-adds on neighbouring numbers, whatever the stride,
 * the padding or the size of the plane.
 *
 * rows[k][y] and columns[k][x] say which row and column of the plane that is read belongs to (y, x) of the plane that
 * is written, under kernel row or column k; -1 where that lies in the padding, or between the rows of a strided
 * convolution's input gradient. Compile with -DREAL=float or double.
 */
#include <stddef.h>
#include <stdint.h>

typedef REAL vec __attribute__((vector_size(32), aligned(sizeof(REAL)), may_alias));
enum { LANES = 32 / sizeof(REAL), WIDE = 8, HALF = WIDE / 2 };

typedef struct {
    int32_t images, height, width;             /* of the planes that are written */
    int32_t source_height, source_width;       /* of the planes that are read */
    int32_t kernel_height, kernel_width, most; /* `most`: largest number of taps of one channel */
    const int32_t *rows, *columns;
} Geometry;

/* One tap of a row: where its source row begins, its columns, its weight. */
typedef struct {
    const REAL *row;
    const int32_t *columns;
    REAL weight;
} Tap;

/* `count` vectors of images, from `image` on, of one pixel; `count` is a constant where this is inlined. */
static inline __attribute__((always_inline)) void pixel(
    const Tap *taps, int n, int x, ptrdiff_t images, ptrdiff_t image, REAL *out, const int count)
{
    vec sum[WIDE] = {0};
    for (int t = 0; t < n; t++) {
        const int32_t column = taps[t].columns[x];
        if (column < 0)
            continue;
        const vec *in = (const vec *)(taps[t].row + column * images + image);
        for (int v = 0; v < count; v++)
            sum[v] += taps[t].weight * in[v];
    }
    for (int v = 0; v < count; v++)
        ((vec *)(out + image))[v] = sum[v];
}

static void row(const Tap *taps, int n, const Geometry *g, REAL *out)
{
    const ptrdiff_t images = g->images;
    for (int x = 0; x < g->width; x++, out += images) {
        ptrdiff_t image = 0;
        for (; image + WIDE * LANES <= images; image += WIDE * LANES)
            pixel(taps, n, x, images, image, out, WIDE);
        for (; image + HALF * LANES <= images; image += HALF * LANES)
            pixel(taps, n, x, images, image, out, HALF);
        for (; image + LANES <= images; image += LANES)
            pixel(taps, n, x, images, image, out, 1);
        for (; image < images; image++) {
            REAL sum = 0;
            for (int t = 0; t < n; t++)
                if (taps[t].columns[x] >= 0)
                    sum += taps[t].weight * taps[t].row[taps[t].columns[x] * images + image];
            out[image] = sum;
        }
    }
}

/* out[c] = sum over the taps of c. Taps of channel c are begin[c] to begin[c + 1]; `order` is where a tap's weight
 * lies in `weights`, NULL for the same order. Used for the output (taps by output channel) and for the input's
 * gradient (taps by input channel). */
void gather(const Geometry *g, int channels, const int32_t *begin, const int32_t *source, const int32_t *ky,
            const int32_t *kx, const int32_t *order, const REAL *weights, const REAL *in, REAL *out)
{
    const ptrdiff_t images = g->images, line = g->width * images, source_line = g->source_width * images;
#pragma omp parallel
    {
        Tap taps[g->most + 1];
#pragma omp for collapse(2) schedule(static)
        for (int y = 0; y < g->height; y++)
            for (int c = 0; c < channels; c++) {
                int n = 0;
                for (int t = begin[c]; t < begin[c + 1]; t++) {
                    const int32_t r = g->rows[ky[t] * g->height + y];
                    if (r < 0)
                        continue;
                    taps[n].row = in + ((ptrdiff_t)source[t] * g->source_height + r) * source_line;
                    taps[n].columns = g->columns + kx[t] * g->width;
                    taps[n++].weight = weights[order ? order[t] : t];
                }
                row(taps, n, g, out + ((ptrdiff_t)c * g->height + y) * line);
            }
    }
}

static double dot(const REAL *a, const REAL *b, const int32_t *columns, int width, ptrdiff_t images)
{
    double total = 0;
    vec sum[WIDE] = {0};
    for (int x = 0; x < width; x++) {
        if (columns[x] < 0)
            continue;
        const REAL *p = a + x * images, *q = b + columns[x] * images;
        ptrdiff_t image = 0;
        for (; image + WIDE * LANES <= images; image += WIDE * LANES)
            for (int v = 0; v < WIDE; v++)
                sum[v] += ((const vec *)(p + image))[v] * ((const vec *)(q + image))[v];
        for (; image + HALF * LANES <= images; image += HALF * LANES)
            for (int v = 0; v < HALF; v++)
                sum[v] += ((const vec *)(p + image))[v] * ((const vec *)(q + image))[v];
        for (; image + LANES <= images; image += LANES)
            sum[0] += *(const vec *)(p + image) * *(const vec *)(q + image);
        for (; image < images; image++)
            total += (double)(p[image] * q[image]);
    }
    for (int v = 1; v < WIDE; v++)
        sum[0] += sum[v];
    for (int l = 0; l < LANES; l++)
        total += (double)sum[0][l];
    return total;
}

/* gradient[t] = sum over images and pixels of grad_out times in, for every tap. Rows come outermost so that the rows
 * in use stay in the cache. */
void weight_gradient(const Geometry *g, int count, const int32_t *target, const int32_t *source, const int32_t *ky,
                     const int32_t *kx, const REAL *grad_out, const REAL *in, double *gradient)
{
    const ptrdiff_t images = g->images, line = g->width * images, source_line = g->source_width * images;
    const int block = 64;
    for (int t = 0; t < count; t++)
        gradient[t] = 0;
#pragma omp parallel for schedule(dynamic)
    for (int first = 0; first < count; first += block)
        for (int y = 0; y < g->height; y++)
            for (int t = first; t < first + block && t < count; t++) {
                const int32_t r = g->rows[ky[t] * g->height + y];
                if (r >= 0)
                    gradient[t] += dot(grad_out + ((ptrdiff_t)target[t] * g->height + y) * line,
                                       in + ((ptrdiff_t)source[t] * g->source_height + r) * source_line,
                                       g->columns + kx[t] * g->width, g->width, images);
            }
}
