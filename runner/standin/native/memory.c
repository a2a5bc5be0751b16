// Memory as address space: nothing is there until somebody touches it.
//
// One range is reserved for the process and cut into spans, one a device and the last for pinned
// host memory, so that what a pointer is follows from its address. A span is handed out in
// granules.
#include "standin.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define LARGEST_SPAN ((size_t)2 << 40)
#define SMALL ((size_t)1 << 20)     // up to it, allocations share granules on a real GPU
#define CONTEXT ((size_t)552402944) // what a context takes of an H200 before anything else does

typedef struct {
    size_t bytes, counted;
} Taken;

typedef struct {
    size_t cursor, used;
    uint32_t *granules; // of the block that starts at a granule, 0 where it is free
    Taken *taken;
    void **backing; // what virtual_memory.c has mapped there, by granule
} Span;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static char *base;
static size_t span_bytes, span_granules;
static int span_count;
static Span *spans;

static void *reserve(size_t bytes, int protection) {
    void *at = mmap(NULL, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return at == MAP_FAILED ? NULL : at;
}

static void begin(void) {
    int count = settings()->devices + 1;
    size_t least = 2 * settings()->memory;
    char *at = NULL;
    for (span_bytes = LARGEST_SPAN; !at && span_bytes >= least && span_bytes; span_bytes /= 2)
        if ((at = reserve(span_bytes * (size_t)count + GRANULE, PROT_NONE))) break;
    Span *made = calloc((size_t)count, sizeof *made);
    span_granules = span_bytes / GRANULE;
    for (int i = 0; at && made && i < count; i++) {
        made[i].used = i < count - 1 && settings()->memory > 2 * CONTEXT ? CONTEXT : 0;
        made[i].granules = reserve(span_granules * sizeof(uint32_t), PROT_READ | PROT_WRITE);
        made[i].taken = reserve(span_granules * sizeof(Taken), PROT_READ | PROT_WRITE);
        made[i].backing = reserve(span_granules * sizeof(void *), PROT_READ | PROT_WRITE);
        if (!made[i].granules || !made[i].taken || !made[i].backing) at = NULL;
    }
    if (!at || !made) {
        fprintf(stderr,
                "stand-in GPU: no address space: is ulimit -v set, or overcommit forbidden?\n");
        return;
    }
    base = (char *)(((uintptr_t)at + GRANULE - 1) & ~(uintptr_t)(GRANULE - 1));
    spans = made;
    span_count = count;
}

int span_of(const void *pointer) {
    if (!base || (char *)pointer < base) return -1;
    size_t span = (size_t)((char *)pointer - base) / span_bytes;
    return span < (size_t)span_count ? (int)span : -1;
}
static char *span_start(int span) { return base + (size_t)span * span_bytes; }
static size_t granule_of(const void *pointer) {
    return (size_t)((char *)pointer - base) % span_bytes / GRANULE;
}
int is_host_span(int span) { return span == span_count - 1; }
static int span_for(int device) { return device < 0 ? span_count - 1 : device; }

// `need` free granules in a row, from the cursor on and then from the start; -1 if there are none.
static long find_room(const Span *span, size_t need) {
    size_t starts[2] = {span->cursor, 0}, ends[2] = {span_granules, span_granules};
    for (int turn = 0; turn < 2; turn++) {
        size_t run = 0;
        for (size_t at = starts[turn]; at < ends[turn];) {
            if (span->granules[at]) {
                at += span->granules[at];
                run = 0;
            } else if (at++, ++run == need) {
                return (long)(at - need);
            }
        }
    }
    return -1;
}

static void *place(Span *span, int index, size_t bytes, size_t counted) {
    size_t need = (bytes + GRANULE - 1) / GRANULE;
    long at = find_room(span, need);
    if (at < 0) return NULL;
    char *start = span_start(index) + (size_t)at * GRANULE;
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
    if (mmap(start, need * GRANULE, PROT_READ | PROT_WRITE, flags, -1, 0) == MAP_FAILED)
        return NULL;
    span->granules[at] = (uint32_t)need;
    span->taken[at] = (Taken){bytes, counted};
    span->cursor = (size_t)at + need == span_granules ? 0 : (size_t)at + need;
    span->used += counted;
    return start;
}

// What an allocation takes of the GPU: whole granules if it is large.
static size_t cost(size_t bytes) {
    size_t unit = bytes <= SMALL ? 512 : GRANULE;
    return (bytes + unit - 1) / unit * unit;
}

// Counts memory of a device that has no address yet, or counts it off again.
int count_memory(int device, size_t bytes) {
    pthread_once(&once, begin);
    pthread_mutex_lock(&lock);
    int fits = spans && spans[device].used + bytes <= settings()->memory;
    if (fits) spans[device].used += bytes;
    pthread_mutex_unlock(&lock);
    return fits ? SUCCESS : OUT_OF_MEMORY;
}
void uncount_memory(int device, size_t bytes) {
    pthread_mutex_lock(&lock);
    spans[device].used -= bytes;
    pthread_mutex_unlock(&lock);
}
void **backing_at(const void *pointer) {
    int index = span_of(pointer);
    return index < 0 ? NULL : spans[index].backing + granule_of(pointer);
}

int take_memory(void **pointer, size_t bytes, int device, int counted) {
    pthread_once(&once, begin);
    *pointer = NULL;
    if (!bytes) return SUCCESS;
    if (!spans || bytes > span_bytes) return OUT_OF_MEMORY;
    int index = span_for(device);
    size_t counts = counted ? cost(bytes) : 0;
    pthread_mutex_lock(&lock);
    if (spans[index].used + counts <= settings()->memory || !counts)
        *pointer = place(&spans[index], index, bytes, counts);
    pthread_mutex_unlock(&lock);
    return *pointer ? SUCCESS : OUT_OF_MEMORY;
}

int give_memory(void *pointer) {
    if (!pointer) return SUCCESS;
    int index = span_of(pointer), error = INVALID_VALUE;
    pthread_mutex_lock(&lock);
    size_t at = index < 0 ? 0 : granule_of(pointer);
    if (index >= 0 && spans[index].granules[at] && (uintptr_t)pointer % GRANULE == 0) {
        int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
        mmap(pointer, spans[index].granules[at] * GRANULE, PROT_NONE, flags, -1, 0);
        spans[index].used -= spans[index].taken[at].counted;
        spans[index].granules[at] = 0;
        error = SUCCESS;
    }
    pthread_mutex_unlock(&lock);
    return error;
}

// The block that a pointer lies in: few look-ups are asked for inside of large blocks, so going
// back from granule to granule does.
Block block_of(const void *pointer) {
    Block block = {.device = -1};
    int index = span_of(pointer);
    if (index < 0) return block;
    pthread_mutex_lock(&lock);
    size_t last = granule_of(pointer), at = last;
    while (at && !spans[index].granules[at]) at--;
    if (spans[index].granules[at] > last - at) {
        block.device = index == span_count - 1 ? -1 : index;
        block.start = span_start(index) + at * GRANULE;
        block.size = spans[index].taken[at].bytes;
    }
    pthread_mutex_unlock(&lock);
    return block;
}

size_t memory_used(int device) {
    pthread_once(&once, begin);
    return spans ? spans[span_for(device)].used : 0;
}

void copy_small(void *to, const void *from, size_t bytes) {
    if (bytes <= SMALL_COPY) memmove(to, from, bytes);
}
void fill_small(void *to, int value, size_t bytes) {
    if (bytes <= SMALL_COPY) memset(to, value, bytes);
}
void fill_words(void *to, unsigned value, size_t words) {
    for (size_t i = 0; i < words && words <= SMALL_COPY / 4; i++) ((unsigned *)to)[i] = value;
}
