// The driver's devices, contexts and libraries; its memory, streams and launches stand with the
// runtime's.
#include "standin.h"
#include <stdio.h>
#include <string.h>

#define DEPTH 64
static __thread int stack[DEPTH], depth; // devices of pushed contexts

int cuInit(void) { return settings()->devices ? SUCCESS : NO_DEVICE; }
int cuDriverGetVersion(int *version) {
    *version = settings()->cuda_version;
    return SUCCESS;
}

// ---- devices

static int check(int device) { return is_device(device) ? SUCCESS : INVALID_DEVICE; }

int cuDeviceGetCount(int *count) {
    *count = settings()->devices;
    return SUCCESS;
}
int cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return check(ordinal);
}
int cuDeviceGetName(char *name, int length, int device) {
    snprintf(name, (size_t)length, "%s", settings()->name);
    return check(device);
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    return device_attribute(value, attribute, device);
}
int cuDeviceTotalMem_v2(size_t *bytes, int device) {
    *bytes = settings()->memory;
    return check(device);
}
int cuDeviceGetUuid_v2(unsigned char *uuid, int device) {
    memset(uuid, 0x5d, 16);
    if (!check(device)) uuid[15] = (unsigned char)pci_bus(device);
    return check(device);
}
int cuDeviceComputeCapability(int *major, int *minor, int device) {
    *major = settings()->major;
    *minor = settings()->minor;
    return check(device);
}
int cuDeviceGetPCIBusId(char *text, int length, int device) {
    if (check(device)) return INVALID_DEVICE;
    snprintf(text, (size_t)length, "0000:%02x:00.0", pci_bus(device));
    return SUCCESS;
}
int cuDeviceCanAccessPeer(int *can, int device, int peer) {
    *can = device != peer;
    return SUCCESS;
}
int cuDeviceGetP2PAttribute(int *value) {
    *value = 1;
    return SUCCESS;
}
int cuDeviceGetDefaultMemPool(void **pool, int device) {
    *pool = handle_of(POOL_TAG, (uint32_t)device);
    return check(device);
}
int cuDevicePrimaryCtxRetain(void **context, int device) {
    *context = handle_of(CONTEXT_TAG, (uint32_t)device);
    return check(device);
}
int cuDevicePrimaryCtxRelease_v2(void) { return SUCCESS; }
int cuDevicePrimaryCtxReset_v2(void) { return SUCCESS; }
int cuDevicePrimaryCtxSetFlags_v2(void) { return SUCCESS; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    *flags = 0;
    *active = 1;
    return check(device);
}

// ---- contexts: each device has one, and the current device is the current context

int cuCtxGetCurrent(void **context) {
    *context = handle_of(CONTEXT_TAG, (uint32_t)current_device);
    return SUCCESS;
}
int cuCtxSetCurrent(void *context) {
    if (!context) return SUCCESS;
    if (!handle_is(CONTEXT_TAG, context)) return INVALID_HANDLE;
    current_device = (int)handle_index(context);
    return SUCCESS;
}
int cuCtxPushCurrent_v2(void *context) {
    if (depth == DEPTH) return OUT_OF_MEMORY;
    stack[depth++] = current_device;
    return cuCtxSetCurrent(context);
}
int cuCtxPopCurrent_v2(void **context) {
    if (context) cuCtxGetCurrent(context);
    if (depth) current_device = stack[--depth];
    return SUCCESS;
}
int cuCtxCreate_v2(void **context, unsigned flags, int device) {
    *context = handle_of(CONTEXT_TAG, (uint32_t)device);
    return check(device) ? INVALID_DEVICE : cuCtxPushCurrent_v2(*context);
}
int cuCtxCreate_v4(void **context, void *parameters, unsigned flags, int device) {
    return cuCtxCreate_v2(context, flags, device);
}
int cuCtxDestroy_v2(void) { return SUCCESS; }
int cuCtxGetDevice(int *device) {
    *device = current_device;
    return SUCCESS;
}
int cuCtxGetFlags(unsigned *flags) {
    *flags = 0;
    return SUCCESS;
}
int cuCtxGetApiVersion(void *context, unsigned *version) {
    *version = (unsigned)settings()->cuda_version;
    return SUCCESS;
}
int cuCtxSynchronize(void) { return SUCCESS; }
int cuCtxGetLimit(size_t *value) {
    *value = 1024;
    return SUCCESS;
}
int cuCtxSetLimit(void) { return SUCCESS; }
int cuCtxEnablePeerAccess(void) { return SUCCESS; }
int cuCtxGetStreamPriorityRange(int *least, int *greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return SUCCESS;
}

// ---- libraries and modules: each has one kernel, whatever its name

static int load_file(void **library, const char *path) {
    int error;
    *library = library_of_file(path, &error);
    return error;
}
static int load_data(void **library) {
    *library = library_of_data();
    return SUCCESS;
}
static int find_kernel(void **kernel, const void *library) {
    if (!is_library(library)) return INVALID_HANDLE;
    *kernel = kernel_of(library);
    return SUCCESS;
}
static int find_global(void **pointer, size_t *bytes) {
    if (bytes) *bytes = SMALL_COPY;
    return take_memory(pointer, SMALL_COPY, current_device, 0);
}
static int enumerate(void **kernels, unsigned count, const void *library) {
    return count ? find_kernel(kernels, library) : SUCCESS;
}

int cuLibraryLoadFromFile(void **library, const char *path) { return load_file(library, path); }
int cuLibraryLoadData(void **library) { return load_data(library); }
int cuLibraryUnload(void) { return SUCCESS; }
int cuLibraryGetKernelCount(unsigned *count) {
    *count = 1;
    return SUCCESS;
}
int cuLibraryEnumerateKernels(void **kernels, unsigned count, void *library) {
    return enumerate(kernels, count, library);
}
int cuLibraryGetKernel(void **kernel, void *library) { return find_kernel(kernel, library); }
int cuLibraryGetModule(void **module, void *library) {
    *module = library;
    return SUCCESS;
}
int cuLibraryGetGlobal(void **pointer, size_t *bytes) { return find_global(pointer, bytes); }
int cuKernelGetFunction(void **function, void *kernel) {
    *function = kernel;
    return SUCCESS;
}
int cuKernelGetLibrary(void **library, void *kernel) {
    *library = handle_of(LIBRARY_TAG, handle_index(kernel));
    return SUCCESS;
}
int cuModuleLoad(void **module, const char *path) { return load_file(module, path); }
int cuModuleLoadData(void **module) { return load_data(module); }
int cuModuleLoadDataEx(void **module) { return load_data(module); }
int cuModuleLoadFatBinary(void **module) { return load_data(module); }
int cuModuleUnload(void) { return SUCCESS; }
int cuModuleGetFunction(void **function, void *module) { return find_kernel(function, module); }
int cuModuleGetFunctionCount(unsigned *count) {
    *count = 1;
    return SUCCESS;
}
int cuModuleEnumerateFunctions(void **functions, unsigned count, void *module) {
    return enumerate(functions, count, module);
}
int cuModuleGetGlobal_v2(void **pointer, size_t *bytes) { return find_global(pointer, bytes); }
int cuFuncGetModule(void **module, void *kernel) { return cuKernelGetLibrary(module, kernel); }
int cuFuncLoad(void) { return SUCCESS; }

int cudaLibraryLoadFromFile(void **library, const char *path) {
    return failed_with(load_file(library, path));
}
int cudaLibraryLoadData(void **library) { return load_data(library); }
int cudaLibraryUnload(void) { return SUCCESS; }
int cudaLibraryGetKernel(void **kernel, void *library) {
    return failed_with(find_kernel(kernel, library));
}
int cudaLibraryGetKernelCount(unsigned *count) {
    *count = 1;
    return SUCCESS;
}
int cudaLibraryEnumerateKernels(void **kernels, unsigned count, void *library) {
    return failed_with(enumerate(kernels, count, library));
}
int cudaLibraryGetGlobal(void **pointer, size_t *bytes) {
    return failed_with(find_global(pointer, bytes));
}

// ---- tensor maps: 128 bytes that nothing reads

int cuTensorMapEncodeTiled(void *map) {
    memset(map, 0, 128);
    return SUCCESS;
}
int cuTensorMapReplaceAddress(void) { return SUCCESS; }

// ---- the driver's log: it never says anything

int cuLogsRegisterCallback(void *function, void *data, void **handle) {
    if (handle) *handle = function;
    return SUCCESS;
}
int cuLogsUnregisterCallback(void) { return SUCCESS; }
