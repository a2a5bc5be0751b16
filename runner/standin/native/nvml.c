// NVML, as far as torch and servers ask it: the same library under a second name.
//
// It knows all devices, whatever CUDA_VISIBLE_DEVICES says; a device's handle is its number plus
// one.
#include "standin.h"
#include <stdio.h>
#include <string.h>

enum { NVML_NOT_SUPPORTED = 3, NVML_NOT_FOUND = 6 };
typedef struct {
    unsigned long long total, free, used;
} Memory;
typedef struct {
    unsigned version;
    unsigned long long total, reserved, free, used;
} Memory2;

static int index_of(const void *handle) { return (int)(uintptr_t)handle - 1; }
static int handle_at(int index, void **handle) {
    *handle = (void *)(uintptr_t)(index + 1);
    return index >= 0 && index < settings()->physical_devices ? SUCCESS : NVML_NOT_FOUND;
}

int nvmlInit(void) { return SUCCESS; }
int nvmlInit_v2(void) { return SUCCESS; }
int nvmlInitWithFlags(void) { return SUCCESS; }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int error) {
    return error ? "not known to the stand-in GPU" : "Success";
}
int nvmlSystemGetDriverVersion(char *text, unsigned length) {
    snprintf(text, length, "580.0");
    return SUCCESS;
}
int nvmlSystemGetCudaDriverVersion(int *version) {
    *version = settings()->cuda_version;
    return SUCCESS;
}
int nvmlSystemGetCudaDriverVersion_v2(int *version) {
    return nvmlSystemGetCudaDriverVersion(version);
}

int nvmlDeviceGetCount(unsigned *count) {
    *count = (unsigned)settings()->physical_devices;
    return SUCCESS;
}
int nvmlDeviceGetCount_v2(unsigned *count) { return nvmlDeviceGetCount(count); }
int nvmlDeviceGetHandleByIndex(unsigned index, void **handle) {
    return handle_at((int)index, handle);
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    return handle_at((int)index, handle);
}
int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
    unsigned bus = 0;
    if (strlen(uuid) >= 2) sscanf(uuid + strlen(uuid) - 2, "%x", &bus);
    return handle_at((int)bus - 1, handle);
}
int nvmlDeviceGetHandleByPciBusId_v2(const char *text, void **handle) {
    unsigned bus = 0;
    sscanf(text, "%*x:%x:", &bus);
    return handle_at((int)bus - 1, handle);
}
int nvmlDeviceGetIndex(const void *handle, unsigned *index) {
    *index = (unsigned)index_of(handle);
    return SUCCESS;
}
int nvmlDeviceGetName(const void *handle, char *text, unsigned length) {
    snprintf(text, length, "%s", settings()->name);
    return SUCCESS;
}
int nvmlDeviceGetUUID(const void *handle, char *text, unsigned length) {
    snprintf(text, length, "GPU-5d5d5d5d-5d5d-5d5d-5d5d-5d5d5d5d5d%02x", 1 + index_of(handle));
    return SUCCESS;
}
int nvmlDeviceGetCudaComputeCapability(const void *handle, int *major, int *minor) {
    *major = settings()->major;
    *minor = settings()->minor;
    return SUCCESS;
}

// What this process has taken: nobody sees into others.
static size_t used_by(int physical) {
    for (int i = 0; i < settings()->devices; i++)
        if (settings()->physical[i] == physical) return memory_used(i);
    return 0;
}
int nvmlDeviceGetMemoryInfo(const void *handle, Memory *memory) {
    size_t used = used_by(index_of(handle));
    *memory = (Memory){settings()->memory, settings()->memory - used, used};
    return SUCCESS;
}
int nvmlDeviceGetMemoryInfo_v2(const void *handle, Memory2 *memory) {
    size_t used = used_by(index_of(handle));
    *memory = (Memory2){memory->version, settings()->memory, 0, settings()->memory - used, used};
    return SUCCESS;
}
int nvmlDeviceGetComputeRunningProcesses(const void *handle, unsigned *count) {
    *count = 0;
    return SUCCESS;
}
int nvmlDeviceGetP2PStatus(const void *handle, const void *peer, int index, int *status) {
    *status = 0;
    return SUCCESS;
}
int nvmlDeviceGetNumaNodeId(void) { return NVML_NOT_SUPPORTED; }
int nvmlDeviceGetCpuAffinity(void) { return NVML_NOT_SUPPORTED; }

// No fabric joins these GPUs.
enum { FABRIC_NOT_SUPPORTED = 0 };
typedef struct {
    unsigned version;
    unsigned char cluster[16];
    int status;
    unsigned clique;
    unsigned char state;
    unsigned health;
} Fabric;
int nvmlDeviceGetGpuFabricInfoV(const void *handle, Fabric *fabric) {
    *fabric = (Fabric){.version = fabric->version, .state = FABRIC_NOT_SUPPORTED};
    return SUCCESS;
}
int nvmlDeviceGetNvLinkState(void) { return NVML_NOT_SUPPORTED; }
int nvmlDeviceGetNvLinkRemoteDeviceType(void) { return NVML_NOT_SUPPORTED; }
int nvmlDeviceGetNvLinkRemotePciInfo_v2(void) { return NVML_NOT_SUPPORTED; }
