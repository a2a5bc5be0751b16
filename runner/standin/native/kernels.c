// Kernels and variables that are compiled into libraries, and their launches by the runtime.
#include "standin.h"
#include <stdlib.h>
#include <string.h>

typedef struct {
    Dim3 grid, block;
    size_t shared;
    void *stream;
    const void *attributes;
    unsigned count;
} LaunchConfig;

// ---- registration, by the constructors of libraries with kernels

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
typedef struct Variable {
    const void *host;
    size_t bytes;
    void *device;
    struct Variable *next;
} Variable;
static Variable *variables;

void **__cudaRegisterFatBinary(void) {
    static void *handle[2];
    return handle;
}
void __cudaRegisterFatBinaryEnd(void) {}
void __cudaUnregisterFatBinary(void) {}
void __cudaRegisterFunction(void) {}
char __cudaInitModule(void) { return 1; }
void __cudaRegisterVar(void **handle, const void *host, char *address, const char *name,
                       int external, size_t bytes) {
    Variable *variable = malloc(sizeof *variable);
    if (!variable) abort();
    pthread_mutex_lock(&lock);
    *variable = (Variable){host, bytes, NULL, variables};
    variables = variable;
    pthread_mutex_unlock(&lock);
}
void __cudaRegisterManagedVar(void **handle, void **host, char *address, const char *name,
                              int external, size_t bytes) {
    __cudaRegisterVar(handle, (void *)host, address, name, external, bytes);
}

static Variable *variable_of(const void *symbol) {
    pthread_mutex_lock(&lock);
    Variable *variable = variables;
    while (variable && variable->host != symbol) variable = variable->next;
    if (variable && !variable->device)
        take_memory(&variable->device, variable->bytes, current_device, 0);
    pthread_mutex_unlock(&lock);
    return variable;
}
int cudaGetSymbolAddress(void **pointer, const void *symbol) {
    Variable *variable = variable_of(symbol);
    if (!variable) return failed_with(NOT_FOUND);
    *pointer = variable->device;
    return SUCCESS;
}
int cudaGetSymbolSize(size_t *bytes, const void *symbol) {
    Variable *variable = variable_of(symbol);
    if (!variable) return failed_with(NOT_FOUND);
    *bytes = variable->bytes;
    return SUCCESS;
}
int cudaMemcpyToSymbol(const void *symbol, const void *from, size_t bytes, size_t offset) {
    Variable *variable = variable_of(symbol);
    if (!variable || offset + bytes > variable->bytes) return failed_with(INVALID_VALUE);
    copy_small((char *)variable->device + offset, from, bytes);
    return SUCCESS;
}
int cudaMemcpyToSymbolAsync(const void *symbol, const void *from, size_t bytes, size_t offset) {
    return cudaMemcpyToSymbol(symbol, from, bytes, offset);
}
int cudaMemcpyFromSymbol(void *to, const void *symbol, size_t bytes, size_t offset) {
    Variable *variable = variable_of(symbol);
    if (!variable || offset + bytes > variable->bytes) return failed_with(INVALID_VALUE);
    copy_small(to, (char *)variable->device + offset, bytes);
    return SUCCESS;
}

// ---- launches

static __thread struct {
    Dim3 grid, block;
    size_t shared;
    void *stream;
} pushed;

unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared, void *stream) {
    pushed.grid = grid;
    pushed.block = block;
    pushed.shared = shared;
    pushed.stream = stream;
    return 0;
}
int __cudaPopCallConfiguration(Dim3 *grid, Dim3 *block, size_t *shared, void **stream) {
    *grid = pushed.grid;
    *block = pushed.block;
    *shared = pushed.shared;
    *stream = pushed.stream;
    return SUCCESS;
}

static int launch(const void *kernel, size_t shared, void *stream) {
    if (shared > (size_t)settings()->shared_optin) return INVALID_VALUE;
    note_launch(kernel, stream);
    return SUCCESS;
}
int cudaLaunchKernel(const void *kernel, Dim3 grid, Dim3 block, void **arguments, size_t shared,
                     void *stream) {
    return failed_with(launch(kernel, shared, stream));
}
int __cudaLaunchKernel(const void *kernel, Dim3 grid, Dim3 block, void **arguments, size_t shared,
                       void *stream) {
    return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}
int cudaLaunchCooperativeKernel(const void *kernel, Dim3 grid, Dim3 block, void **arguments,
                                size_t shared, void *stream) {
    return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}
int cudaLaunchKernelExC(const LaunchConfig *config, const void *kernel) {
    return failed_with(launch(kernel, config->shared, config->stream));
}
int cuLaunchKernel(const void *kernel, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                   unsigned by, unsigned bz, unsigned shared, void *stream) {
    return launch(kernel, shared, stream);
}
int cuLaunchCooperativeKernel(const void *kernel, unsigned gx, unsigned gy, unsigned gz,
                              unsigned bx, unsigned by, unsigned bz, unsigned shared,
                              void *stream) {
    return launch(kernel, shared, stream);
}

typedef struct {
    Dim3 grid, block;
    unsigned shared;
    void *stream;
    const void *attributes;
    unsigned count;
} DriverConfig;
int cuLaunchKernelEx(const DriverConfig *config, const void *kernel) {
    return launch(kernel, config->shared, config->stream);
}

// ---- what a kernel is like; nobody has compiled it, so it is like any

enum { DYNAMIC_SHARED = 8 };
static int set_attribute(int attribute, int value) {
    return attribute == DYNAMIC_SHARED && value > settings()->shared_optin ? INVALID_VALUE
                                                                           : SUCCESS;
}
static int get_attribute(int attribute) {
    switch (attribute) {
        case 0: return 1024; // threads per block
        case 4: return 32;   // registers
        case 5:
        case 6: return 10 * settings()->major + settings()->minor; // PTX and binary
        case DYNAMIC_SHARED: return 49152;
        case 9: return -1; // carve-out
        default: return 0;
    }
}
typedef struct {
    size_t shared, constant, local;
    int threads, registers, ptx, binary, cache, dynamic_shared, carveout, cluster[7], reserved[16];
} FunctionAttributes;
_Static_assert(sizeof(FunctionAttributes) == 144, "cudaFuncAttributes");

int cudaFuncGetAttributes(FunctionAttributes *out) {
    memset(out, 0, sizeof *out);
    out->threads = get_attribute(0);
    out->registers = get_attribute(4);
    out->ptx = out->binary = get_attribute(6);
    out->dynamic_shared = get_attribute(DYNAMIC_SHARED);
    out->carveout = get_attribute(9);
    return SUCCESS;
}
int cudaFuncSetAttribute(const void *kernel, int attribute, int value) {
    return failed_with(set_attribute(attribute, value));
}
int cudaKernelSetAttributeForDevice(const void *kernel, int attribute, int value) {
    return failed_with(set_attribute(attribute, value));
}
int cudaFuncSetCacheConfig(void) { return SUCCESS; }
int __cudaGetKernel(const void **kernel, const void *symbol) {
    *kernel = symbol;
    return SUCCESS;
}
int cudaGetKernel(const void **kernel, const void *symbol) {
    *kernel = symbol;
    return SUCCESS;
}
int cudaGetFuncBySymbol(const void **function, const void *symbol) {
    *function = symbol;
    return SUCCESS;
}
int cuFuncSetAttribute(const void *kernel, int attribute, int value) {
    return set_attribute(attribute, value);
}
int cuFuncGetAttribute(int *value, int attribute) {
    *value = get_attribute(attribute);
    return SUCCESS;
}
int cuFuncSetCacheConfig(void) { return SUCCESS; }
int cuKernelSetAttribute(int attribute, int value) { return set_attribute(attribute, value); }
int cuKernelGetAttribute(int *value, int attribute) {
    *value = get_attribute(attribute);
    return SUCCESS;
}

int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *kernel, int threads,
                                                  size_t shared) {
    *blocks = blocks_per_sm(threads, shared);
    return SUCCESS;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *kernel,
                                                           int threads, size_t shared) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kernel, threads, shared);
}
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *kernel, int threads,
                                                size_t shared) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kernel, threads, shared);
}
int cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *kernel,
                                                         int threads, size_t shared) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kernel, threads, shared);
}
int cudaOccupancyMaxActiveClusters(int *count, const void *kernel, const LaunchConfig *config) {
    *count = clusters(config->attributes, config->count);
    return SUCCESS;
}
int cuOccupancyMaxActiveClusters(int *count, const void *kernel, const DriverConfig *config) {
    *count = clusters(config->attributes, config->count);
    return SUCCESS;
}
