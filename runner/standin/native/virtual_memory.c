// The driver's virtual memory: physical memory is counted once and mapped anywhere.
//
// All addresses can be touched from the start, so mapping only keeps the books.
#include "standin.h"
#include <stdlib.h>

typedef struct {
    size_t bytes;
    int device, references;
} Backing;
typedef struct {
    int type, handle_types, location, device;
    void *metadata;
    unsigned char flags[8];
} AllocationProperties;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

int cuMemGetAllocationGranularity(size_t *bytes) {
    *bytes = GRANULE;
    return SUCCESS;
}
int cuMemAddressReserve(void **pointer, size_t bytes) {
    return take_memory(pointer, bytes, current_device, 0);
}
int cuMemAddressFree(void *pointer) { return give_memory(pointer); }

int cuMemCreate(Backing **handle, size_t bytes, const AllocationProperties *properties) {
    int device = properties->device;
    if (!is_device(device)) return INVALID_DEVICE;
    Backing *made = malloc(sizeof *made);
    if (!made || count_memory(device, bytes)) {
        free(made);
        return OUT_OF_MEMORY;
    }
    *made = (Backing){bytes, device, 1};
    *handle = made;
    return SUCCESS;
}

// With the lock held.
static void drop(Backing *backing) {
    if (--backing->references) return;
    uncount_memory(backing->device, backing->bytes);
    free(backing);
}
int cuMemRelease(Backing *handle) {
    pthread_mutex_lock(&lock);
    drop(handle);
    pthread_mutex_unlock(&lock);
    return SUCCESS;
}
int cuMemMap(void *pointer, size_t bytes, size_t offset, Backing *handle) {
    void **backing = backing_at(pointer);
    if (!backing) return INVALID_VALUE;
    pthread_mutex_lock(&lock);
    handle->references++;
    *backing = handle;
    pthread_mutex_unlock(&lock);
    return SUCCESS;
}
int cuMemUnmap(void *pointer, size_t bytes) {
    void **backing = backing_at(pointer);
    if (!backing) return INVALID_VALUE;
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < (bytes + GRANULE - 1) / GRANULE; i++) {
        if (backing[i]) drop(backing[i]);
        backing[i] = NULL;
    }
    pthread_mutex_unlock(&lock);
    return SUCCESS;
}
int cuMemSetAccess(void) { return SUCCESS; }
int cuMemRetainAllocationHandle(Backing **handle, void *pointer) {
    void **backing = backing_at(pointer);
    if (!backing) return INVALID_VALUE;
    pthread_mutex_lock(&lock);
    *handle = *backing;
    if (*handle) (*handle)->references++;
    pthread_mutex_unlock(&lock);
    return *handle ? SUCCESS : INVALID_VALUE;
}
int cuMemGetAllocationPropertiesFromHandle(AllocationProperties *out, const Backing *handle) {
    *out = (AllocationProperties){.type = 1, .location = 1, .device = handle->device};
    return SUCCESS;
}
