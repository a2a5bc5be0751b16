// NCCL: communicators that know their size and rank, and collectives that move nothing.
//
// Ranks never meet in it: what they must agree on, servers exchange over gloo or their own sockets.
#include "standin.h"
#include <stdlib.h>
#include <string.h>

enum { ID_BYTES = 128, NCCL_SYSTEM_ERROR = 2, NCCL_VERSION = 23007 };
typedef struct {
    int ranks, rank, device;
} Communicator;
typedef struct {
    char bytes[ID_BYTES];
} Id;

static int communicator(Communicator **out, int ranks, int rank, int device) {
    *out = malloc(sizeof **out);
    if (!*out) return NCCL_SYSTEM_ERROR;
    **out = (Communicator){ranks, rank, device};
    return SUCCESS;
}

int ncclGetVersion(int *version) {
    *version = NCCL_VERSION;
    return SUCCESS;
}
int ncclGetUniqueId(Id *id) {
    memset(id, 0, sizeof *id);
    return SUCCESS;
}
int ncclCommGetUniqueId(void *of, Id *id) { return ncclGetUniqueId(id); }
const char *ncclGetErrorString(int error) { return error ? "not known to the stand-in" : "ok"; }
const char *ncclGetLastError(void) { return ""; }

// ---- communicators

int ncclCommInitRank(Communicator **out, int ranks, Id id, int rank) {
    return communicator(out, ranks, rank, current_device);
}
int ncclCommInitRankConfig(Communicator **out, int ranks, Id id, int rank) {
    return ncclCommInitRank(out, ranks, id, rank);
}
int ncclCommInitRankScalable(Communicator **out, int ranks, int rank) {
    return communicator(out, ranks, rank, current_device);
}
int ncclCommInitAll(Communicator **out, int count, const int *devices) {
    int error = SUCCESS;
    for (int i = 0; i < count && !error; i++)
        error = communicator(out + i, count, i, devices ? devices[i] : i);
    return error;
}
// The group's other members cannot be asked: a colour's size stays that of the whole.
int ncclCommSplit(const Communicator *from, int color, int key, Communicator **out) {
    *out = NULL;
    return color < 0 ? SUCCESS : communicator(out, from->ranks, key, from->device);
}
int ncclCommShrink(const Communicator *from, int *excluded, int count, Communicator **out) {
    return communicator(out, from->ranks - count, from->rank, from->device);
}
int ncclCommCount(const Communicator *comm, int *ranks) {
    *ranks = comm->ranks;
    return SUCCESS;
}
int ncclCommUserRank(const Communicator *comm, int *rank) {
    *rank = comm->rank;
    return SUCCESS;
}
int ncclCommCuDevice(const Communicator *comm, int *device) {
    *device = comm->device;
    return SUCCESS;
}
int ncclCommGetAsyncError(const Communicator *comm, int *error) {
    *error = SUCCESS;
    return SUCCESS;
}
int ncclCommFinalize(void) { return SUCCESS; }
int ncclCommDestroy(Communicator *comm) {
    free(comm);
    return SUCCESS;
}
int ncclCommAbort(Communicator *comm) { return ncclCommDestroy(comm); }
int ncclCommRevoke(void) { return SUCCESS; }
int ncclCommSuspend(void) { return SUCCESS; }
int ncclCommResume(void) { return SUCCESS; }

// ---- memory that it registers

int ncclMemAlloc(void **pointer, size_t bytes) {
    return take_memory(pointer, bytes, current_device, 1) ? NCCL_SYSTEM_ERROR : SUCCESS;
}
int ncclMemFree(void *pointer) { return give_memory(pointer) ? INVALID_VALUE : SUCCESS; }
int ncclCommRegister(void *comm, void *pointer, size_t bytes, void **handle) {
    *handle = pointer;
    return SUCCESS;
}
int ncclCommDeregister(void) { return SUCCESS; }
int ncclCommWindowRegister(void *comm, void *pointer, size_t bytes, void **window) {
    *window = pointer;
    return SUCCESS;
}
int ncclCommWindowDeregister(void) { return SUCCESS; }

// ---- communication: the stream is the last parameter

int ncclGroupStart(void) { return SUCCESS; }
int ncclGroupEnd(void) { return SUCCESS; }
int ncclRedOpCreatePreMulSum(int *operation) {
    *operation = 5; // the first number after the built-in operations
    return SUCCESS;
}
int ncclRedOpDestroy(void) { return SUCCESS; }
int ncclAllReduce(const void *from, void *to, size_t count, int type, int operation, void *comm,
                  void *stream) {
    note_work(stream);
    return SUCCESS;
}
int ncclReduceScatter(const void *from, void *to, size_t count, int type, int operation,
                      void *comm, void *stream) {
    return ncclAllReduce(from, to, count, type, operation, comm, stream);
}
int ncclReduce(void) { return SUCCESS; }
int ncclAllGather(const void *from, void *to, size_t count, int type, void *comm, void *stream) {
    note_work(stream);
    return SUCCESS;
}
int ncclAlltoAll(const void *from, void *to, size_t count, int type, void *comm, void *stream) {
    return ncclAllGather(from, to, count, type, comm, stream);
}
int ncclBroadcast(const void *from, void *to, size_t count, int type, int root, void *comm,
                  void *stream) {
    note_work(stream);
    return SUCCESS;
}
int ncclBcast(void *data, size_t count, int type, int root, void *comm, void *stream) {
    note_work(stream);
    return SUCCESS;
}
int ncclSend(const void *from, size_t count, int type, int peer, void *comm, void *stream) {
    return ncclBcast(NULL, count, type, peer, comm, stream);
}
int ncclRecv(void *to, size_t count, int type, int peer, void *comm, void *stream) {
    return ncclBcast(to, count, type, peer, comm, stream);
}
int ncclGather(void) { return SUCCESS; }
int ncclScatter(void) { return SUCCESS; }
