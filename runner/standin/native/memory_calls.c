// Allocation, copies and fills, and what a pointer is: the runtime's functions, then the driver's.
#include "standin.h"
#include <string.h>

// ---- allocation in the runtime

int cudaMalloc(void **pointer, size_t bytes) {
    return failed_with(take_memory(pointer, bytes, current_device, 1));
}
int cudaMallocAsync(void **pointer, size_t bytes) { return cudaMalloc(pointer, bytes); }
int cudaMallocFromPoolAsync(void **pointer, size_t bytes, void *pool) {
    return failed_with(take_memory(pointer, bytes, (int)handle_index(pool), 1));
}
int cudaMallocManaged(void **pointer, size_t bytes) { return cudaMalloc(pointer, bytes); }
int cudaMallocPitch(void **pointer, size_t *pitch, size_t width, size_t height) {
    *pitch = (width + 511) / 512 * 512;
    return cudaMalloc(pointer, *pitch * height);
}
int cudaFree(void *pointer) { return failed_with(give_memory(pointer)); }
int cudaFreeAsync(void *pointer) { return cudaFree(pointer); }
int cudaHostAlloc(void **pointer, size_t bytes) {
    return failed_with(take_memory(pointer, bytes, -1, 0));
}
int cudaMallocHost(void **pointer, size_t bytes) { return cudaHostAlloc(pointer, bytes); }
int cudaFreeHost(void *pointer) { return cudaFree(pointer); }
int cudaHostRegister(void) { return SUCCESS; }
int cudaHostUnregister(void) { return SUCCESS; }
int cudaHostGetDevicePointer(void **device, void *host) {
    *device = host;
    return SUCCESS;
}
int cudaMemGetInfo(size_t *available, size_t *total) {
    *total = settings()->memory;
    *available = *total - memory_used(current_device);
    return SUCCESS;
}

typedef struct {
    int type, device;
    void *device_pointer, *host_pointer;
    long reserved[8];
} PointerAttributes;
enum { UNREGISTERED = 0, HOST = 1, DEVICE = 2 };

int cudaPointerGetAttributes(PointerAttributes *out, const void *pointer) {
    int index = span_of(pointer), host = is_host_span(index);
    memset(out, 0, sizeof *out);
    out->type = index < 0 ? UNREGISTERED : host ? HOST : DEVICE;
    out->device = index < 0 ? -2 : host ? current_device : index;
    out->device_pointer = index < 0 ? NULL : (void *)pointer;
    out->host_pointer = index < 0 || host ? (void *)pointer : NULL;
    return SUCCESS;
}

// ---- pools: each device has its default one, which is the device's memory

enum { RELEASE_THRESHOLD = 4, RESERVED_CURRENT = 5 };
int cudaDeviceGetDefaultMemPool(void **pool, int device) {
    *pool = handle_of(POOL_TAG, (uint32_t)device);
    return SUCCESS;
}
int cudaDeviceGetMemPool(void **pool, int device) {
    return cudaDeviceGetDefaultMemPool(pool, device);
}
int cudaMemPoolSetAttribute(void) { return SUCCESS; }
int cudaMemPoolGetAttribute(void *pool, int attribute, void *value) {
    if (attribute < RELEASE_THRESHOLD)
        *(int *)value = 1;
    else
        *(uint64_t *)value =
            attribute < RESERVED_CURRENT ? 0 : memory_used((int)handle_index(pool));
    return SUCCESS;
}
int cudaMemPoolSetAccess(void) { return SUCCESS; }
int cudaMemPoolTrimTo(void) { return SUCCESS; }
int cudaDeviceGetGraphMemAttribute(int device, int attribute, uint64_t *value) {
    *value = 0;
    return SUCCESS;
}
int cudaDeviceSetGraphMemAttribute(void) { return SUCCESS; }
int cudaDeviceGraphMemTrim(void) { return SUCCESS; }

// ---- copies and fills of the runtime

int cudaMemcpy(void *to, const void *from, size_t bytes) {
    copy_small(to, from, bytes);
    return SUCCESS;
}
int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *stream) {
    note_work(stream);
    return cudaMemcpy(to, from, bytes);
}
int cudaMemcpyPeer(void *to, int device, const void *from, int peer, size_t bytes) {
    return cudaMemcpy(to, from, bytes);
}
int cudaMemcpyPeerAsync(void *to, int device, const void *from, int peer, size_t bytes,
                        void *stream) {
    return cudaMemcpyAsync(to, from, bytes, 0, stream);
}
int cudaMemcpy2D(char *to, size_t to_pitch, const char *from, size_t from_pitch, size_t width,
                 size_t height) {
    for (size_t row = 0; row < height && width * height <= SMALL_COPY; row++)
        memmove(to + row * to_pitch, from + row * from_pitch, width);
    return SUCCESS;
}
int cudaMemcpy2DAsync(char *to, size_t to_pitch, const char *from, size_t from_pitch, size_t width,
                      size_t height, int kind, void *stream) {
    note_work(stream);
    return cudaMemcpy2D(to, to_pitch, from, from_pitch, width, height);
}
int cudaMemset(void *to, int value, size_t bytes) {
    fill_small(to, value, bytes);
    return SUCCESS;
}
int cudaMemsetAsync(void *to, int value, size_t bytes, void *stream) {
    note_work(stream);
    return cudaMemset(to, value, bytes);
}
int cudaMemset2D(char *to, size_t pitch, int value, size_t width, size_t height) {
    for (size_t row = 0; row < height && width * height <= SMALL_COPY; row++)
        memset(to + row * pitch, value, width);
    return SUCCESS;
}
int cudaMemset2DAsync(char *to, size_t pitch, int value, size_t width, size_t height,
                      void *stream) {
    note_work(stream);
    return cudaMemset2D(to, pitch, value, width, height);
}

// ---- memory of another process: address space of the same size, which shares nothing

typedef struct {
    size_t bytes;
    char rest[56];
} MemoryHandle;
int cudaIpcGetMemHandle(MemoryHandle *handle, void *pointer) {
    memset(handle, 0, sizeof *handle);
    handle->bytes = block_of(pointer).size;
    return handle->bytes ? SUCCESS : failed_with(INVALID_VALUE);
}
int cudaIpcOpenMemHandle(void **pointer, MemoryHandle handle) {
    return failed_with(take_memory(pointer, handle.bytes, current_device, 0));
}
int cudaIpcCloseMemHandle(void *pointer) { return cudaFree(pointer); }

// ---- the driver's: plain allocation

int cuMemAlloc_v2(void **pointer, size_t bytes) {
    return take_memory(pointer, bytes, current_device, 1);
}
int cuMemAllocAsync(void **pointer, size_t bytes) { return cuMemAlloc_v2(pointer, bytes); }
int cuMemAllocManaged(void **pointer, size_t bytes) { return cuMemAlloc_v2(pointer, bytes); }
int cuMemFree_v2(void *pointer) { return give_memory(pointer); }
int cuMemFreeAsync(void *pointer) { return give_memory(pointer); }
int cuMemAllocHost_v2(void **pointer, size_t bytes) { return take_memory(pointer, bytes, -1, 0); }
int cuMemHostAlloc(void **pointer, size_t bytes) { return take_memory(pointer, bytes, -1, 0); }
int cuMemFreeHost(void *pointer) { return give_memory(pointer); }
int cuMemHostRegister_v2(void) { return SUCCESS; }
int cuMemHostUnregister(void) { return SUCCESS; }
int cuMemHostGetDevicePointer_v2(void **device, void *host) {
    *device = host;
    return SUCCESS;
}
int cuMemGetInfo_v2(size_t *available, size_t *total) { return cudaMemGetInfo(available, total); }
int cuMemGetAddressRange_v2(void **start, size_t *bytes, void *pointer) {
    Block block = block_of(pointer);
    if (start) *start = block.start;
    if (bytes) *bytes = block.size;
    return block.size ? SUCCESS : NOT_FOUND;
}
int cuMemcpyHtoD_v2(void *to, const void *from, size_t bytes) {
    return cudaMemcpy(to, from, bytes);
}
int cuMemcpyDtoH_v2(void *to, const void *from, size_t bytes) {
    return cudaMemcpy(to, from, bytes);
}
int cuMemcpyDtoD_v2(void *to, const void *from, size_t bytes) {
    return cudaMemcpy(to, from, bytes);
}
int cuMemcpy(void *to, const void *from, size_t bytes) { return cudaMemcpy(to, from, bytes); }
int cuMemcpyAsync(void *to, const void *from, size_t bytes, void *stream) {
    return cudaMemcpyAsync(to, from, bytes, 0, stream);
}
int cuMemcpyHtoDAsync_v2(void *to, const void *from, size_t bytes, void *stream) {
    return cuMemcpyAsync(to, from, bytes, stream);
}
int cuMemcpyDtoHAsync_v2(void *to, const void *from, size_t bytes, void *stream) {
    return cuMemcpyAsync(to, from, bytes, stream);
}
int cuMemcpyDtoDAsync_v2(void *to, const void *from, size_t bytes, void *stream) {
    return cuMemcpyAsync(to, from, bytes, stream);
}
int cuMemsetD8_v2(void *to, unsigned char value, size_t bytes) {
    return cudaMemset(to, value, bytes);
}
int cuMemsetD8Async(void *to, unsigned char value, size_t bytes, void *stream) {
    return cudaMemsetAsync(to, value, bytes, stream);
}
int cuMemsetD32_v2(void *to, unsigned value, size_t words) {
    fill_words(to, value, words);
    return SUCCESS;
}
int cuMemsetD32Async(void *to, unsigned value, size_t words, void *stream) {
    note_work(stream);
    return cuMemsetD32_v2(to, value, words);
}

static int pointer_attribute(void *out, int attribute, const void *pointer) {
    Block block = block_of(pointer);
    int index = span_of(pointer), host = is_host_span(index);
    switch (attribute) {
        case 1:
            *(void **)out = handle_of(CONTEXT_TAG, (uint32_t)(host ? current_device : index));
            break;
        case 2: *(unsigned *)out = host ? HOST : DEVICE; break;
        case 3: *(const void **)out = pointer; break;
        case 4: *(const void **)out = host ? pointer : NULL; break;
        case 6:
        case 8: *(unsigned *)out = 0; break; // synchronous operations, managed
        case 7: *(uint64_t *)out = (uint64_t)(uintptr_t)block.start; break;
        case 9: *(int *)out = host ? current_device : index; break;
        case 10:
        case 13: *(unsigned *)out = 1; break; // fit for IPC, mapped
        case 11: *(void **)out = block.start; break;
        case 12: *(size_t *)out = block.size; break;
        default: return NOT_SUPPORTED;
    }
    return SUCCESS;
}
int cuPointerGetAttribute(void *out, int attribute, const void *pointer) {
    return span_of(pointer) < 0 ? INVALID_VALUE : pointer_attribute(out, attribute, pointer);
}
int cuPointerGetAttributes(unsigned count, const int *attributes, void **out, const void *pointer) {
    int error = SUCCESS;
    for (unsigned i = 0; i < count && !error; i++) {
        if (span_of(pointer) >= 0)
            error = pointer_attribute(out[i], attributes[i], pointer);
        else if (attributes[i] == 9)
            *(int *)out[i] = -2;
        else
            *(int *)out[i] = 0; // as much as every attribute has
    }
    return error;
}
int cuPointerSetAttribute(void) { return SUCCESS; }
