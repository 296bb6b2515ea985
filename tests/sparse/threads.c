/* GCC's OpenMP on plain threads, for the thread sanitizer: it sees pthread_create, pthread_join and these locks, but not
 * how libgomp's threads wait for one another. Every loop is shared dynamically; no loop is nested in another. */
#include <pthread.h>
#include <stdbool.h>

enum { THREADS = 3 };

typedef struct {
    long next, end, step, chunk;
    int left; /* threads that have ended the loop */
    bool begun;
} Loop;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_barrier_t barrier;
static Loop loop;
static _Thread_local int number, count = 1;

typedef struct {
    void (*function)(void *);
    void *data;
    int number;
} Work;

static void *work(void *given)
{
    const Work *w = given;
    number = w->number;
    count = THREADS;
    w->function(w->data);
    number = 0;
    count = 1;
    return NULL;
}

void GOMP_parallel(void (*function)(void *), void *data, unsigned threads, unsigned flags)
{
    (void)threads, (void)flags;
    pthread_t others[THREADS];
    Work each[THREADS];
    loop = (Loop){0};
    pthread_barrier_init(&barrier, NULL, THREADS);
    for (int i = 1; i < THREADS; i++) {
        each[i] = (Work){function, data, i};
        pthread_create(&others[i], NULL, work, &each[i]);
    }
    each[0] = (Work){function, data, 0};
    work(&each[0]);
    for (int i = 1; i < THREADS; i++)
        pthread_join(others[i], NULL);
    pthread_barrier_destroy(&barrier);
}

bool GOMP_loop_nonmonotonic_dynamic_next(long *first, long *last)
{
    pthread_mutex_lock(&lock);
    const bool any = loop.step > 0 ? loop.next < loop.end : loop.next > loop.end;
    if (any) {
        const long rest = loop.end - loop.next, piece = loop.step * loop.chunk;
        *first = loop.next;
        loop.next += (piece < 0 ? piece > rest : piece < rest) ? piece : rest;
        *last = loop.next;
    }
    pthread_mutex_unlock(&lock);
    return any;
}

bool GOMP_loop_nonmonotonic_dynamic_start(long begin, long end, long step, long chunk, long *first, long *last)
{
    pthread_mutex_lock(&lock);
    if (!loop.begun)
        loop = (Loop){begin, end, step, chunk, 0, true};
    pthread_mutex_unlock(&lock);
    return GOMP_loop_nonmonotonic_dynamic_next(first, last);
}

void GOMP_barrier(void)
{
    pthread_barrier_wait(&barrier);
}

void GOMP_loop_end_nowait(void)
{
    pthread_mutex_lock(&lock);
    if (++loop.left == count)
        loop = (Loop){0};
    pthread_mutex_unlock(&lock);
}

void GOMP_loop_end(void)
{
    GOMP_loop_end_nowait();
    GOMP_barrier();
}

int omp_get_max_threads(void)
{
    return THREADS;
}

int omp_get_num_threads(void)
{
    return count;
}

int omp_get_thread_num(void)
{
    return number;
}
