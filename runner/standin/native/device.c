// The GPU as the runtime describes it: attributes, properties, the current device.
#include "standin.h"
#include <stdio.h>
#include <string.h>

__thread int current_device;

// ---- attributes; runtime and driver number them alike

// Physical devices sit on buses 1, 2 and so on, whichever of them are visible.
int pci_bus(int device) { return 1 + settings()->physical[device]; }

int is_device(int device) { return device >= 0 && device < settings()->devices; }

static int attribute_value(int attribute, int device) {
    switch (attribute) {
        case 1: return 1024; // threads per block
        case 2:
        case 3: return 1024;       // block x, y
        case 4: return 64;         // block z
        case 5: return 2147483647; // grid x
        case 6:
        case 7: return 65535;       // grid y, z
        case 8: return 49152;       // shared memory per block
        case 9: return 65536;       // constant memory
        case 10: return 32;         // warp
        case 11: return 2147483647; // pitch
        case 12:
        case 82: return 65536;   // registers per block, per SM
        case 13: return 1980000; // clock, kHz
        case 14: return 512;     // texture alignment
        case 15:
        case 19:
        case 31:
        case 41: return 1; // overlap, host mapping, concurrency, unified
        case 16: return settings()->sms;
        case 30: return 512; // surface alignment
        case 32: return 1;   // ECC
        case 33: return pci_bus(device);
        case 36: return 3201000; // memory clock, kHz
        case 37: return 6016;    // memory bus, bits
        case 38: return settings()->l2;
        case 39: return settings()->threads_per_sm;
        case 40: return 3;  // copy engines
        case 51: return 32; // texture pitch alignment
        case 75: return settings()->major;
        case 76: return settings()->minor;
        case 78:
        case 79:
        case 80: return 1; // stream priorities, L1 caches
        case 81: return settings()->shared_per_sm;
        case 83:
        case 89:
        case 90: return 1; // managed memory, pre-emption
        case 95: return 1; // cooperative launch
        case 97: return settings()->shared_optin;
        case 99: return 1;                                  // host memory can be registered
        case 102: return 1;                                 // virtual memory management
        case 106: return settings()->major == 12 ? 24 : 32; // blocks per SM
        case 108: return settings()->l2 / 8 * 5;            // persisting L2
        case 109: return 134217728;                         // access policy window
        case 111: return 1024;                              // reserved shared memory per block
        case 115: return 1;                                 // memory pools
        case 120: return 1;                                 // clusters
        case 126: return 4;                                 // memory sync domains
        case 127: return 1;                                 // tensor maps
        case 131:
        case 134: return -1; // NUMA nodes
        default: return 0;   // a feature that the stand-in has not
    }
}
int device_attribute(int *value, int attribute, int device) {
    if (!is_device(device)) return INVALID_DEVICE;
    if (attribute < 1 || attribute > 160) return INVALID_VALUE;
    *value = attribute_value(attribute, device);
    return SUCCESS;
}
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    return failed_with(device_attribute(value, attribute, device));
}

int blocks_per_sm(int threads, size_t shared) {
    int by_threads = threads > 0 ? settings()->threads_per_sm / threads : 0;
    int by_memory = (int)((size_t)settings()->shared_per_sm / (shared + 1024));
    int most = attribute_value(106, 0);
    if (by_memory < most) most = by_memory;
    return by_threads < most ? by_threads : most;
}

// How many clusters fit, by the cluster dimension among a launch's attributes (72 bytes each).
int clusters(const void *attributes, unsigned count) {
    enum { BYTES = 72, CLUSTER_DIMENSION = 4 };
    for (unsigned i = 0; i < count; i++) {
        const unsigned *words = (const unsigned *)((const char *)attributes + BYTES * (size_t)i);
        unsigned size = words[2] * words[3] * words[4];
        if (words[0] == CLUSTER_DIMENSION && size) return settings()->sms / (int)size;
    }
    return settings()->sms;
}

// ---- properties, in the layout of CUDA 13 (a test holds the offsets against its headers)

typedef struct {
    char name[256];
    unsigned char uuid[16];
    char luid[8];
    unsigned luid_mask;
    size_t memory, shared;
    int registers, warp;
    size_t pitch;
    int threads, block[3], grid[3];
    size_t constant;
    int major, minor;
    size_t texture_alignment, texture_pitch;
    int sms, integrated, map_host;
    int textures_and_surfaces[39];
    size_t surface_alignment;
    int concurrent, ecc, pci_bus, pci_device, pci_domain, tcc, copy_engines, unified, bus_width;
    int l2, persisting_l2, threads_per_sm, priorities, global_l1, local_l1;
    size_t shared_per_sm;
    int registers_per_sm, managed, multi_gpu, multi_gpu_group, host_atomics, pageable;
    int concurrent_managed, preemption, host_pointer, cooperative;
    size_t shared_optin;
    int host_page_tables, direct_managed, blocks_per_sm, access_window;
    size_t reserved_shared;
    int host_register, sparse, host_register_read_only, timeline, pools, rdma;
    unsigned rdma_flush;
    int rdma_order;
    unsigned pool_handles;
    int mapping_array, ipc_event, cluster, function_pointers, numa_config, numa_id, mps, host_numa;
    unsigned pci_device_id, pci_subsystem_id;
    int multinode_ipc, reserved[56];
} Properties;
_Static_assert(sizeof(Properties) == 1008, "cudaDeviceProp of CUDA 13");
_Static_assert(offsetof(Properties, sms) == 384 && offsetof(Properties, l2) == 596, "CUDA 13");

int cudaGetDeviceProperties(Properties *p, int device) {
    if (!is_device(device)) return failed_with(INVALID_DEVICE);
    memset(p, 0, sizeof *p);
    memcpy(p->name, settings()->name, sizeof p->name);
    memset(p->uuid, 0x5d, sizeof p->uuid);
    p->uuid[15] = (unsigned char)pci_bus(device);
    p->memory = settings()->memory;
    p->pitch = 2147483647;
    p->constant = 65536;
    p->texture_alignment = p->surface_alignment = 512;
    p->texture_pitch = 32;
    p->shared = 49152;
    p->shared_per_sm = (size_t)settings()->shared_per_sm;
    p->shared_optin = (size_t)settings()->shared_optin;
    p->reserved_shared = 1024;
    const struct {
        int *field, attribute;
    } fields[] = {
        {&p->registers, 12},
        {&p->warp, 10},
        {&p->threads, 1},
        {&p->block[0], 2},
        {&p->block[1], 3},
        {&p->block[2], 4},
        {&p->grid[0], 5},
        {&p->grid[1], 6},
        {&p->grid[2], 7},
        {&p->major, 75},
        {&p->minor, 76},
        {&p->sms, 16},
        {&p->map_host, 19},
        {&p->concurrent, 31},
        {&p->ecc, 32},
        {&p->pci_bus, 33},
        {&p->copy_engines, 40},
        {&p->unified, 41},
        {&p->bus_width, 37},
        {&p->l2, 38},
        {&p->persisting_l2, 108},
        {&p->threads_per_sm, 39},
        {&p->priorities, 78},
        {&p->global_l1, 79},
        {&p->local_l1, 80},
        {&p->registers_per_sm, 82},
        {&p->managed, 83},
        {&p->concurrent_managed, 89},
        {&p->preemption, 90},
        {&p->cooperative, 95},
        {&p->blocks_per_sm, 106},
        {&p->access_window, 109},
        {&p->host_register, 99},
        {&p->pools, 115},
        {&p->cluster, 120},
        {&p->numa_id, 131},
        {&p->host_numa, 134},
    };
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++)
        *fields[i].field = attribute_value(fields[i].attribute, device);
    return SUCCESS;
}

// CUDA 12 calls its function by another name and lays the structure out otherwise.
int cudaGetDeviceProperties_v2(void) {
    return failed_with(missing("cudaGetDeviceProperties_v2 (CUDA 12)", NOT_SUPPORTED));
}

// ---- devices of the runtime

int cudaGetDeviceCount(int *count) {
    *count = settings()->devices;
    return *count ? SUCCESS : failed_with(NO_DEVICE);
}
int cudaGetDevice(int *device) {
    *device = current_device;
    return SUCCESS;
}
int cudaSetDevice(int device) {
    if (!is_device(device)) return failed_with(INVALID_DEVICE);
    current_device = device;
    return SUCCESS;
}
int cudaInitDevice(int device) { return failed_with(is_device(device) ? SUCCESS : INVALID_DEVICE); }
int cudaChooseDevice(int *device) {
    *device = 0;
    return SUCCESS;
}
int cudaGetDeviceFlags(unsigned *flags) {
    *flags = 0;
    return SUCCESS;
}
int cudaSetDeviceFlags(void) { return SUCCESS; }
int cudaDeviceSynchronize(void) { return SUCCESS; }
int cudaDeviceReset(void) { return SUCCESS; }
int cudaDeviceCanAccessPeer(int *can, int device, int peer) {
    *can = device != peer;
    return SUCCESS;
}
int cudaDeviceEnablePeerAccess(void) { return SUCCESS; }
int cudaDeviceDisablePeerAccess(void) { return SUCCESS; }
int cudaDeviceGetP2PAttribute(int *value) {
    *value = 1;
    return SUCCESS;
}
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return SUCCESS;
}
int cudaDeviceGetPCIBusId(char *text, int length, int device) {
    if (!is_device(device)) return failed_with(INVALID_DEVICE);
    snprintf(text, (size_t)length, "0000:%02x:00.0", pci_bus(device));
    return SUCCESS;
}
int cudaDeviceGetByPCIBusId(int *device, const char *text) {
    unsigned bus = 0;
    sscanf(text, "%*x:%x:", &bus);
    for (*device = 0; *device < settings()->devices; ++*device)
        if (pci_bus(*device) == (int)bus) return SUCCESS;
    return failed_with(INVALID_DEVICE);
}
int cudaDeviceSetLimit(void) { return SUCCESS; }
int cudaDeviceGetLimit(size_t *value, int limit) {
    *value = limit == 0 ? 1024 : 8 << 20;
    return SUCCESS;
}
int cudaDeviceSetCacheConfig(void) { return SUCCESS; }
int cudaDriverGetVersion(int *version) {
    *version = settings()->cuda_version;
    return SUCCESS;
}
int cudaRuntimeGetVersion(int *version) {
    *version = settings()->cuda_version;
    return SUCCESS;
}
int cudaProfilerStart(void) { return SUCCESS; }
int cudaProfilerStop(void) { return SUCCESS; }
