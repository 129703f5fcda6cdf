/* Loaded before all others (LD_PRELOAD), this lets one allocation fail: the n-th one from arm(n). */

#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t), *__libc_memalign(size_t, size_t);

static atomic_long wanted = -1, made;

void arm(long n) {
    made = 0;
    wanted = n;
}

/* Return how many allocations were asked for since. */
long disarm(void) {
    wanted = -1;
    return made;
}

static int fails(void) {
    if (wanted < 0 || atomic_fetch_add(&made, 1) != wanted) return 0;
    errno = ENOMEM;
    return 1;
}

void *malloc(size_t size) { return fails() ? NULL : __libc_malloc(size); }
void *calloc(size_t count, size_t size) { return fails() ? NULL : __libc_calloc(count, size); }
void *realloc(void *old, size_t size) { return fails() ? NULL : __libc_realloc(old, size); }
void *aligned_alloc(size_t unit, size_t size) { return fails() ? NULL : __libc_memalign(unit, size); }
void *memalign(size_t unit, size_t size) { return fails() ? NULL : __libc_memalign(unit, size); }

int posix_memalign(void **into, size_t unit, size_t size) {
    void *memory = fails() ? NULL : __libc_memalign(unit, size);
    if (memory == NULL) return ENOMEM;
    *into = memory;
    return 0;
}
