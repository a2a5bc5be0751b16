// What the files of the stand-in GPU share.
//
// One shared library stands before the CUDA runtime and cuBLAS (LD_PRELOAD) and in the driver's
// place (its SONAME is libcuda.so.1). It holds our own declarations only: machines without a GPU
// have no CUDA headers. Functions are defined with the parameters that they use; where a function
// takes more, the caller puts them where nobody looks, which both x86-64 and aarch64 allow.
#pragma once
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

// Of the error numbers, those that runtime and driver share. They are ours to return.
enum {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    INITIALIZATION_ERROR = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    FILE_NOT_FOUND = 301,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_SUPPORTED = 801,
    CAPTURE_UNSUPPORTED = 900,
};
enum { BLAS_NOT_SUPPORTED = 15 };

#define SMALL_COPY ((size_t)1 << 20) // larger copies and fills are left out
#define GRANULE ((size_t)2 << 20)    // memory is handed out in pieces of it
enum { MOST_DEVICES = 16 };

typedef struct {
    unsigned x, y, z;
} Dim3;

typedef struct {
    char name[256];
    int major, minor, sms, threads_per_sm, l2, shared_optin, shared_per_sm;
    size_t memory;
    int physical_devices, devices; // all, and those that CUDA_VISIBLE_DEVICES lets through
    int physical[MOST_DEVICES];    // which the visible ones are
    int cuda_version;              // 13000 is CUDA 13.0
} Settings;

typedef struct {
    const char *name;
    int (*function)(void);
} Stub;

// Memory as a block of one of the spans (memory.c); size is 0 where a pointer is in none.
typedef struct {
    int device; // -1: the host's
    char *start;
    size_t size;
} Block;

// A stream that captures: all streams that joined it, and the graph that comes of it, share one.
typedef struct {
    int active;
    unsigned long long id;
    size_t nodes;
} Capture;

typedef struct {
    int device, priority;
    unsigned flags;
    unsigned long long id;
    Capture *capture; // the latest; its `active` tells whether it still goes on
} Stream;

// Where a handle must not be confused with an address, its top byte says what it is.
enum { KERNEL_TAG = 0x5d, LIBRARY_TAG = 0x5e, CONTEXT_TAG = 0x5c, POOL_TAG = 0x5b };

static inline void *handle_of(int tag, uint32_t index) {
    return (void *)((uintptr_t)tag << 56 | index);
}
static inline int handle_is(int tag, const void *handle) {
    return (uintptr_t)handle >> 56 == (uintptr_t)tag;
}
static inline uint32_t handle_index(const void *handle) { return (uint32_t)(uintptr_t)handle; }

#pragma GCC visibility push(hidden)

// settings.c, errors.c
const Settings *settings(void);
int failed_with(int error); // also what cudaGetLastError answers next

// device.c
extern __thread int current_device;
int is_device(int device);
int pci_bus(int device);
int device_attribute(int *value, int attribute, int device);
int blocks_per_sm(int threads, size_t shared);
int clusters(const void *attributes, unsigned count);

// memory.c
int take_memory(void **pointer, size_t bytes, int device, int counted);
int give_memory(void *pointer);
int count_memory(int device, size_t bytes);
void uncount_memory(int device, size_t bytes);
Block block_of(const void *pointer);
int span_of(const void *pointer); // of a device its index, then the host's; -1 for neither
int is_host_span(int span);
void **backing_at(const void *pointer);
size_t memory_used(int device);
void copy_small(void *to, const void *from, size_t bytes);
void fill_small(void *to, int value, size_t bytes);
void fill_words(void *to, unsigned value, size_t words);

// stream.c
unsigned long long fresh_id(void);
Stream *stream_of(const void *handle);   // NULL for the default streams, which never capture
Capture *capture_of(const void *handle); // of a stream that captures, else NULL
int is_capturing(const void *stream);
void note_work(void *stream); // a launch, copy or product: one more node where it is captured

// launches.c
void *library_of_file(const char *path, int *error);
void *library_of_data(void);
int is_library(const void *handle);
void *kernel_of(const void *library);
void note_launch(const void *kernel, void *stream);

// missing.c
extern const Stub standin_stubs[]; // sorted by name; generated
extern const int standin_stub_count;
int missing(const char *name, int status);
void *entry_point(const char *name, int version);

#pragma GCC visibility pop
