/* Active entries of many tensors, to and from one vector. Part p of the vector is begin[p] to begin[p + 1]; its entries
 * lie at dense[p][at[p][i]], or one after the other where at[p] is NULL. Compile with -DREAL=float or double.
 */
#include <stdint.h>
#include <string.h>

enum { AHEAD = 24 }; /* entries lie far apart: each is a cache miss, and many can be under way at once */

void gather_parts(int64_t parts, const int64_t *begin, const int64_t *const *at, REAL *const *dense, REAL *vector)
{
#pragma omp parallel for schedule(dynamic, 8)
    for (int64_t p = 0; p < parts; p++) {
        const int64_t n = begin[p + 1] - begin[p], *where = at[p];
        const REAL *from = dense[p];
        REAL *to = vector + begin[p];
        if (!where)
            memcpy(to, from, n * sizeof(REAL));
        else
            for (int64_t i = 0; i < n; i++) {
                __builtin_prefetch(from + where[i + AHEAD < n ? i + AHEAD : n - 1]);
                to[i] = from[where[i]];
            }
    }
}

void scatter_parts(int64_t parts, const int64_t *begin, const int64_t *const *at, REAL *const *dense, const REAL *vector)
{
#pragma omp parallel for schedule(dynamic, 8)
    for (int64_t p = 0; p < parts; p++) {
        const int64_t n = begin[p + 1] - begin[p], *where = at[p];
        const REAL *from = vector + begin[p];
        REAL *to = dense[p];
        if (!where)
            memcpy(to, from, n * sizeof(REAL));
        else
            for (int64_t i = 0; i < n; i++) {
                __builtin_prefetch(to + where[i + AHEAD < n ? i + AHEAD : n - 1], 1);
                to[where[i]] = from[i];
            }
    }
}
