/* Sparse convolution for layers whose inputs are each read by many taps; the layout is that of taps.c.
 *
 * One region of the plane that is written, and one cache line of images, is done at a time. What it reads is first
 * copied side by side, with zeros for the padding, small enough for the second cache. Then every tap is a run of
 * multiply-adds at one offset, whatever padding, stride and dilation: columns of a strided convolution are copied apart
 * by their remainder. A tile of places is summed up in registers, over a block of input channels whose part of the copy
 * fits the first cache, for all output channels before the next block. Compile with -DREAL=float or double.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__AVX512F__)
enum { BYTES = 64, TILE = 16 }; /* of a vector; vectors in a tile, half of the registers */
#elif defined(__AVX__)
enum { BYTES = 32, TILE = 8 };
#elif defined(__aarch64__)
enum { BYTES = 16, TILE = 16 };
#else
enum { BYTES = 16, TILE = 8 };
#endif
typedef REAL vec __attribute__((vector_size(BYTES), aligned(sizeof(REAL)), may_alias));
enum { VECS = 64 / BYTES, PLACES = TILE / VECS }; /* a place of a tile is one cache line of images */
enum { LANES = 64 / sizeof(REAL), PART = BYTES / sizeof(REAL) };
enum { FIRST_CACHE = 24 << 10, SECOND_CACHE = 440 << 10, SUMS = 1300 << 10 }; /* bytes that may be filled */
enum { RUN = 16 };     /* taps of one channel in a block that are worth loading and storing a tile */
enum { EXACT = 4096 }; /* terms that a lane adds up before it goes to a double */

typedef struct {
    int32_t images;
    int32_t rows, columns;                                  /* places that are written */
    int32_t first_row, first_column, row_step, column_step; /* where these are in their plane */
    int32_t height, width, source_height, source_width;     /* of the planes */
    int32_t row_stride, column_stride;                      /* between what neighbours read */
    int32_t top, bottom, left, right;                       /* smallest and largest offset that a tap reads at */
    int32_t row_phases, column_phases; /* bits: which remainders of (offset - smallest) by the stride there are */
} Pass;

/* How a pass is cut into regions of tiles, and the channels that are read into copies of blocks. */
typedef struct {
    int tile_rows, tile_columns, rows, columns; /* of a tile and a region */
    ptrdiff_t phase, row, channel;              /* of the copy, in vectors */
    int copied, block;                          /* channels in a copy, and in a block of it */
    int blocks, regions_down, regions;
} Cut;

typedef struct {
    int32_t offset; /* in the copy, in vectors */
    REAL weight;
} Entry;

static int least(int a, int b) { return a < b ? a : b; }
static int most(int a, int b) { return a > b ? a : b; }
static int pieces(int size, int piece) { return (size + piece - 1) / piece; }

static void choose_tile(const Pass *p, Cut *c)
{
    int area = INT32_MAX;
    for (int rows = 1; rows <= 4; rows *= 2) {
        const int columns = PLACES / rows;
        const int covered = pieces(p->rows, rows) * pieces(p->columns, columns);
        if (covered < area) {
            area = covered;
            c->tile_rows = rows;
            c->tile_columns = columns;
        }
    }
}

static void measure_copy(const Pass *p, Cut *c, int rows, int columns)
{
    c->rows = rows;
    c->columns = columns;
    c->phase = pieces((columns - 1) * p->column_stride + p->right - p->left + 1, p->column_stride) * VECS;
    c->row = c->phase * p->column_stride;
    c->channel = c->row * ((rows - 1) * p->row_stride + p->bottom - p->top + 1);
}

static Cut cut(const Pass *p, int channels, int sources, int count, int copied)
{
    Cut c = {0};
    choose_tile(p, &c);
    measure_copy(p, &c, c.tile_rows, c.tile_columns);
    const int fits = (int)(FIRST_CACHE / (c.channel * BYTES));
    const int enough = (int)((int64_t)RUN * channels * sources / most(count, 1));
    c.block = least(most(most(fits, enough), 1), most(sources, 1));
    c.copied = least(copied, (int)(SECOND_CACHE / (c.channel * BYTES)));
    c.copied = least(most(pieces(c.copied, c.block), 1) * c.block, most(sources, 1));
    for (int grown = 1; grown;) { /* a larger region shares more of what it reads, and a square one most */
        const Cut small = c;
        grown = 0;
        for (int tall = small.rows < small.columns, k = 0; k < 2 && !grown; k++, tall = !tall) {
            const int rows = tall ? 2 * small.rows : small.rows, columns = tall ? small.columns : 2 * small.columns;
            if (tall ? small.rows >= p->rows : small.columns >= p->columns)
                continue;
            measure_copy(p, &c, rows, columns);
            grown = c.copied * c.channel * BYTES <= SECOND_CACHE;
            if (!grown)
                c = small;
        }
    }
    c.blocks = pieces(sources, c.block);
    c.regions_down = pieces(p->rows, c.rows);
    c.regions = c.regions_down * pieces(p->columns, c.columns) * pieces(p->images, LANES);
    return c;
}

static int threads(void)
{
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

/* Taps in an order by block, then channel: begin[block * channels + channel] is the first. `place` is where each
 * tap comes in that order. Returns `begin`, which holds both; NULL where memory is short. */
static int32_t *arrange(const Cut *c, int channels, const int32_t *first, const int32_t *source, int32_t **place)
{
    const int groups = c->blocks * channels;
    int32_t *begin = calloc((size_t)groups + 1 + first[channels], sizeof *begin);
    if (!begin)
        return NULL;
    *place = begin + groups + 1;
    for (int i = 0; i < channels; i++)
        for (int t = first[i]; t < first[i + 1]; t++)
            begin[source[t] / c->block * channels + i + 1]++;
    for (int k = 0; k < groups; k++)
        begin[k + 1] += begin[k];
    for (int i = 0; i < channels; i++)
        for (int t = first[i], n = 0; t < first[i + 1]; t++) {
            n = t > first[i] && source[t] / c->block == source[t - 1] / c->block ? n + 1 : 0;
            (*place)[t] = begin[source[t] / c->block * channels + i] + n;
        }
    return begin;
}

static int32_t offset(const Pass *p, const Cut *c, int source, int dy, int dx)
{
    const int column = dx - p->left;
    return (int32_t)(source % c->copied * c->channel + (dy - p->top) * c->row
                     + column % p->column_stride * c->phase + column / p->column_stride * VECS);
}

static vec *new_copy(const Cut *c)
{
    return aligned_alloc(64, ((size_t)c->copied * c->channel * BYTES + 127) / 64 * 64);
}

/* `count` numbers of a line, and zeros. */
static inline void some(const REAL *from, int count, vec *to)
{
    for (int v = 0; v < VECS; v++) {
        to[v] = (vec){0};
        for (int l = 0; l < PART && v * PART + l < count; l++)
            to[v][l] = from[v * PART + l];
    }
}

/* Copies `count` places, `step` numbers apart; those before `low` and from `high` on are zero. */
static inline void copy_row(
    const REAL *from, ptrdiff_t step, ptrdiff_t next, int low, int high, int count, int lanes, vec *to)
{
    for (int k = 0; k < low * VECS; k++)
        to[k] = (vec){0};
    if (lanes == LANES)
        for (int k = low; k < high; k++) {
            __builtin_prefetch(from + k * step + next); /* rows are short: the machine does not see what comes */
            for (int v = 0; v < VECS; v++)
                to[k * VECS + v] = ((const vec *)(from + k * step))[v];
        }
    else
        for (int k = low; k < high; k++)
            some(from + k * step, lanes, to + k * VECS);
    for (int k = most(high, low) * VECS; k < count * VECS; k++)
        to[k] = (vec){0};
}

/* Where a region or tile is. */
typedef struct {
    int y, x, chunk;
} Place;

static Place place_of(const Pass *p, const Cut *c, int region)
{
    const int chunks = pieces(p->images, LANES), at = region / chunks;
    return (Place){at % c->regions_down * c->rows, at / c->regions_down * c->columns, region % chunks};
}

/* Copies what a region reads of the channels from `first` on. */
static void copy_region(const Pass *p, const Cut *c, const REAL *in, int first, int sources, Place at, vec *to)
{
    const ptrdiff_t images = p->images, image = (ptrdiff_t)at.chunk * LANES;
    const ptrdiff_t plane = (ptrdiff_t)p->source_height * p->source_width * images;
    const int lanes = least((int)(images - image), LANES), rows = (int)(c->channel / c->row), step = p->column_stride;
    for (int s = first; s < first + c->copied && s < sources; s++, to += c->channel)
        for (int i = 0; i < rows; i++) {
            const int r = at.y * p->row_stride + p->top + i, inside = r >= 0 && r < p->source_height;
            for (int f = 0; f < step && p->row_phases >> (i % p->row_stride) & 1; f++) {
                const int column = at.x * step + p->left + f;
                const int count = (int)c->phase / VECS, low = column < 0 ? least(pieces(-column, step), count) : 0;
                const int high = least(pieces(p->source_width - column, step), count);
                const ptrdiff_t begin = s * plane + ((ptrdiff_t)r * p->source_width + column) * images + image;
                if (p->column_phases >> f & 1)
                    copy_row(in + begin, step * images, plane, inside ? low : count, inside ? high : 0, count, lanes,
                             to + i * c->row + f * c->phase);
            }
        }
}

/* Where a tile is written, and how much of it lies in the plane and the batch. */
typedef struct {
    REAL *at;
    ptrdiff_t down, across, plane;
    int rows, columns, lanes;
} Window;

static Window window(const Pass *p, REAL *out, Place at)
{
    const ptrdiff_t images = p->images, plane = (ptrdiff_t)p->height * p->width * images;
    const ptrdiff_t row = p->first_row + (ptrdiff_t)at.y * p->row_step;
    const ptrdiff_t column = p->first_column + (ptrdiff_t)at.x * p->column_step, image = (ptrdiff_t)at.chunk * LANES;
    return (Window){
        out + (row * p->width + column) * images + image, p->width * images * p->row_step, images * p->column_step,
        plane, p->rows - at.y, p->columns - at.x, least((int)(images - image), LANES),
    };
}

static int whole(const Window *w, int rows, int columns)
{
    return w->rows >= rows && w->columns >= columns && w->lanes == LANES;
}

/* Where vector v of a tile is written. */
static inline __attribute__((always_inline)) vec *at(const Window *w, int v, const int columns)
{
    const int place = v / VECS;
    return (vec *)(w->at + place / columns * w->down + place % columns * w->across) + v % VECS;
}

/* The same in a copy, `pitch` vectors from row to row. */
static inline __attribute__((always_inline)) ptrdiff_t in_copy(int v, ptrdiff_t pitch, const int columns)
{
    return v / VECS / columns * pitch + v / VECS % columns * VECS + v % VECS;
}

static int holds(const Window *w, int place, int columns)
{
    return place / columns < w->rows && place % columns < w->columns;
}

static __attribute__((noinline)) void load_part(const Window *w, vec *to, int columns)
{
    for (int k = 0; k < PLACES; k++)
        some((const REAL *)at(w, k * VECS, columns), holds(w, k, columns) ? w->lanes : 0, to + k * VECS);
}

static __attribute__((noinline)) void store_part(const Window *w, const vec *from, int columns)
{
    for (int k = 0; k < PLACES; k++)
        for (int l = 0; holds(w, k, columns) && l < w->lanes; l++)
            ((REAL *)at(w, k * VECS, columns))[l] = from[k * VECS + l / PART][l % PART];
}

/* Adds n taps to a tile; its numbers of rows and columns are constants where this is inlined. */
static inline __attribute__((always_inline)) void add(
    const Entry *e, int n, const vec *from, ptrdiff_t pitch, vec *sum, const int columns)
{
    for (int t = 0; t < n; t++) {
        const vec *in = from + e[t].offset;
        for (int v = 0; v < TILE; v++)
            sum[v] += e[t].weight * in[in_copy(v, pitch, columns)];
    }
}

/* All channels of one tile, with the taps of one block. */
static inline __attribute__((always_inline)) void sums_at(
    const Entry *e, const int32_t *begin, int channels, const vec *from, ptrdiff_t pitch, Window w, int fresh,
    const int columns)
{
    const int all = whole(&w, PLACES / columns, columns);
    for (int i = 0; i < channels; i++, w.at += w.plane) {
        const int n = begin[i + 1] - begin[i];
        if (!n && !fresh)
            continue;
        if (all) {
            vec sum[TILE];
            for (int v = 0; v < TILE; v++) {
                if (fresh && v % VECS == 0) /* of the next channel, which lies far away */
                    __builtin_prefetch((REAL *)at(&w, v, columns) + w.plane, 1);
                sum[v] = fresh ? (vec){0} : *at(&w, v, columns);
            }
            add(e + begin[i], n, from, pitch, sum, columns);
            for (int v = 0; v < TILE; v++)
                *at(&w, v, columns) = sum[v];
        } else {
            vec sum[TILE] = {0};
            if (!fresh)
                load_part(&w, sum, columns);
            add(e + begin[i], n, from, pitch, sum, columns);
            store_part(&w, sum, columns);
        }
    }
}

/* Gradients of the taps of one block from one tile; begin[i] of those of channel i. */
static inline __attribute__((always_inline)) void products_at(
    const int32_t *offsets, const int32_t *begin, int channels, const vec *from, ptrdiff_t pitch, Window w, vec *total,
    const int columns)
{
    const int all = whole(&w, PLACES / columns, columns);
    for (int i = 0; i < channels; i++, w.at += w.plane) {
        vec grad[TILE];
        if (begin[i] == begin[i + 1])
            continue;
        if (!all)
            load_part(&w, grad, columns);
        else
            for (int v = 0; v < TILE; v++) {
                if (v % VECS == 0)
                    __builtin_prefetch((const REAL *)at(&w, v, columns) + w.plane);
                grad[v] = *at(&w, v, columns);
            }
        for (int t = begin[i]; t < begin[i + 1]; t++) {
            const vec *in = from + offsets[t];
            vec even = total[t], odd = {0};
            for (int v = 0; v < TILE; v += 2) {
                even += grad[v] * in[in_copy(v, pitch, columns)];
                odd += grad[v + 1] * in[in_copy(v + 1, pitch, columns)];
            }
            total[t] = even + odd;
        }
    }
}

static void sums_in(const Pass *p, const Cut *c, const Entry *e, const int32_t *begin, int channels, int first,
                    int last, const vec *copy, REAL *out, Place region)
{
    const ptrdiff_t pitch = c->row * p->row_stride;
    for (int y = 0; y < c->rows && region.y + y < p->rows; y += c->tile_rows)
        for (int x = 0; x < c->columns && region.x + x < p->columns; x += c->tile_columns)
            for (int b = first; b < last; b++) {
                const Window w = window(p, out, (Place){region.y + y, region.x + x, region.chunk});
                const vec *from = copy + y * pitch + x * VECS;
                if (c->tile_rows == 1)
                    sums_at(e, begin + b * channels, channels, from, pitch, w, !b, PLACES);
                else if (c->tile_rows == 2)
                    sums_at(e, begin + b * channels, channels, from, pitch, w, !b, PLACES / 2);
                else
                    sums_at(e, begin + b * channels, channels, from, pitch, w, !b, PLACES / 4);
            }
}

static void products_in(const Pass *p, const Cut *c, const int32_t *offsets, const int32_t *begin, int channels,
                        int first, int last, const vec *copy, const REAL *grad, Place region, vec *total)
{
    const ptrdiff_t pitch = c->row * p->row_stride;
    for (int b = first; b < last; b++) /* outermost: the totals of a block stay in the cache */
        for (int y = 0; y < c->rows && region.y + y < p->rows; y += c->tile_rows)
            for (int x = 0; x < c->columns && region.x + x < p->columns; x += c->tile_columns) {
                const Window w = window(p, (REAL *)grad, (Place){region.y + y, region.x + x, region.chunk});
                const vec *from = copy + y * pitch + x * VECS;
                if (c->tile_rows == 1)
                    products_at(offsets, begin + b * channels, channels, from, pitch, w, total, PLACES);
                else if (c->tile_rows == 2)
                    products_at(offsets, begin + b * channels, channels, from, pitch, w, total, PLACES / 2);
                else
                    products_at(offsets, begin + b * channels, channels, from, pitch, w, total, PLACES / 4);
            }
}

/* out[c] = sum over the taps of c, begin[c] to begin[c + 1]: each reads channel source[t], dy[t] rows and dx[t] columns
 * from where the place that is written lies. Sources of a channel ascend. `order` is where a tap's weight lies in
 * `weights`, NULL for the same order. Returns 0, or 1 where memory is short. */
int gather_blocks(const Pass *p, int channels, int sources, const int32_t *first, const int32_t *source,
                  const int32_t *dy, const int32_t *dx, const int32_t *order, const REAL *weights, const REAL *in,
                  REAL *out)
{
    const int count = first[channels];
    const Cut c = cut(p, channels, sources, count, sources);
    int32_t *place, *begin = arrange(&c, channels, first, source, &place);
    Entry *entries = malloc(((size_t)count + 1) * sizeof *entries);
    int failed = !begin || !entries;
    for (int t = 0; t < count && !failed; t++)
        entries[place[t]] = (Entry){offset(p, &c, source[t], dy[t], dx[t]), weights[order ? order[t] : t]};
#pragma omp parallel reduction(| : failed)
    {
        vec *copy = failed ? NULL : new_copy(&c);
        failed |= !copy;
#pragma omp for schedule(dynamic)
        for (int k = 0; k < c.regions; k++)
            for (int s = 0; s < sources && !failed; s += c.copied) {
                const Place region = place_of(p, &c, k);
                const int last = least(pieces(s + c.copied, c.block), c.blocks);
                copy_region(p, &c, in, s, sources, region, copy);
                sums_in(p, &c, entries, begin, channels, s / c.block, last, copy, out, region);
            }
        free(copy);
    }
    free(entries);
    free(begin);
    return failed;
}

/* Adds up the lanes of `sums` into `totals`. */
static void flush(const vec *sums, double *totals, int count)
{
    typedef REAL lanes __attribute__((vector_size(16), may_alias));
    for (int t = 0; t < count; t++) {
        const lanes *part = (const lanes *)&sums[t];
        lanes sum = part[0];
        for (int k = 1; k < BYTES / 16; k++)
            sum += part[k];
        for (int l = 0; l < (int)(16 / sizeof(REAL)); l++)
            totals[t] += (double)sum[l];
    }
}

/* The taps whose sources are s and the following ones of one copy: all regions. */
static void products(const Pass *p, const Cut *c, const int32_t *offsets, const int32_t *begin, int channels,
                     int sources, int s, const REAL *grad, const REAL *in, vec *copy, vec *sums, double *totals)
{
    const int first = s / c->block, last = least(pieces(s + c->copied, c->block), c->blocks);
    const int from = begin[first * channels], to = begin[last * channels];
    for (int k = 0, terms = 0; k < c->regions; k++) {
        const Place region = place_of(p, c, k);
        if (!terms)
            memset(sums + from, 0, (size_t)(to - from) * BYTES);
        copy_region(p, c, in, s, sources, region, copy);
        products_in(p, c, offsets, begin, channels, first, last, copy, grad, region, sums);
        terms += c->rows * c->columns;
        if (terms >= EXACT || k + 1 == c->regions) {
            flush(sums + from, totals + from, to - from);
            terms = 0;
        }
    }
}

/* gradient[t] = sum over images and places of grad_out times in, for every tap; the same taps as in gather_blocks. */
int weight_gradient_blocks(const Pass *p, int channels, int sources, const int32_t *first, const int32_t *source,
                           const int32_t *dy, const int32_t *dx, const REAL *grad_out, const REAL *in, double *gradient)
{
    const int count = first[channels];
    const int each = (int)((int64_t)SUMS * sources / ((int64_t)most(count, 1) * BYTES)); /* their sums fit, too */
    const Cut c = cut(p, channels, sources, count, least(each, pieces(sources, threads())));
    int32_t *place, *begin = arrange(&c, channels, first, source, &place);
    int32_t *offsets = malloc(((size_t)count + 1) * sizeof *offsets);
    double *totals = calloc((size_t)count + 1, sizeof *totals);
    vec *sums = aligned_alloc(64, ((size_t)count * BYTES + 127) / 64 * 64);
    int failed = !begin || !offsets || !totals || !sums;
    for (int t = 0; t < count && !failed; t++)
        offsets[place[t]] = offset(p, &c, source[t], dy[t], dx[t]);
#pragma omp parallel reduction(| : failed)
    {
        vec *copy = failed ? NULL : new_copy(&c);
        failed |= !copy;
#pragma omp for schedule(dynamic)
        for (int s = 0; s < sources; s += c.copied)
            if (!failed)
                products(p, &c, offsets, begin, channels, sources, s, grad_out, in, copy, sums, totals);
        free(copy);
    }
    for (int t = 0; t < count && !failed; t++)
        gradient[t] = totals[place[t]];
    free(sums);
    free(totals);
    free(offsets);
    free(begin);
    return failed;
}
