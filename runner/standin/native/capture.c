// Capture of streams, and graphs: a graph knows how many pieces of work it has, and does nothing.
//
// A capture is its graph, and never freed: streams and events may still point to it.
#include "standin.h"
#include <stdlib.h>

enum { NOT_CAPTURING = 0, CAPTURING = 1 };

static __thread int capture_mode;

int cudaGraphCreate(void **graph) {
    Capture *capture = calloc(1, sizeof *capture);
    if (!capture) return failed_with(OUT_OF_MEMORY);
    capture->id = fresh_id();
    *graph = capture;
    return SUCCESS;
}
int cudaStreamBeginCaptureToGraph(void *handle, void *graph) {
    Stream *stream = stream_of(handle);
    if (!stream || capture_of(handle)) return failed_with(CAPTURE_UNSUPPORTED);
    __atomic_store_n(&((Capture *)graph)->active, 1, __ATOMIC_RELEASE);
    __atomic_store_n(&stream->capture, graph, __ATOMIC_RELEASE);
    return SUCCESS;
}
int cudaStreamBeginCapture(void *handle) {
    void *graph;
    int error = stream_of(handle) ? cudaGraphCreate(&graph) : failed_with(CAPTURE_UNSUPPORTED);
    return error ? error : cudaStreamBeginCaptureToGraph(handle, graph);
}
int cudaStreamEndCapture(void *handle, void **graph) {
    Capture *capture = capture_of(handle);
    *graph = capture;
    if (!capture) return failed_with(INVALID_VALUE);
    __atomic_store_n(&capture->active, 0, __ATOMIC_RELEASE);
    return SUCCESS;
}
int cudaStreamIsCapturing(void *handle, int *status) {
    *status = is_capturing(handle) ? CAPTURING : NOT_CAPTURING;
    return SUCCESS;
}
static void capture_info(void *handle, int *status, unsigned long long *id, void **graph) {
    Capture *capture = capture_of(handle);
    *status = capture ? CAPTURING : NOT_CAPTURING;
    if (id) *id = capture ? capture->id : 0;
    if (graph) *graph = capture;
}
int cudaStreamGetCaptureInfo(void *handle, int *status, unsigned long long *id, void **graph,
                             const void **dependencies, const void **edges, size_t *count) {
    capture_info(handle, status, id, graph);
    if (dependencies) *dependencies = NULL;
    if (edges) *edges = NULL;
    if (count) *count = 0;
    return SUCCESS;
}
int cudaStreamUpdateCaptureDependencies(void) { return SUCCESS; }
int cudaThreadExchangeStreamCaptureMode(int *mode) {
    int old = capture_mode;
    capture_mode = *mode;
    *mode = old;
    return SUCCESS;
}

// ---- graphs

int cudaGraphGetNodes(const Capture *graph, void **nodes, size_t *count) {
    if (!nodes) {
        *count = graph->nodes;
        return SUCCESS;
    }
    if (*count > graph->nodes) *count = graph->nodes;
    for (size_t i = 0; i < *count; i++) nodes[i] = (void *)(uintptr_t)(16 * (i + 1));
    return SUCCESS;
}
int cudaGraphNodeGetDependencies(void *node, void **nodes, void *edges, size_t *count) {
    *count = 0;
    return SUCCESS;
}
int cudaGraphInstantiate(void **out, void *graph) {
    *out = graph;
    return SUCCESS;
}
int cudaGraphInstantiateWithFlags(void **out, void *graph) {
    *out = graph;
    return SUCCESS;
}
int cudaGraphInstantiateWithParams(void **out, void *graph) {
    *out = graph;
    return SUCCESS;
}
int cudaGraphLaunch(void *graph, void *stream) {
    note_work(stream);
    return SUCCESS;
}
int cudaGraphUpload(void) { return SUCCESS; }
int cudaGraphDestroy(void) { return SUCCESS; }
int cudaGraphExecDestroy(void) { return SUCCESS; }

// What a graph should free with itself lives as long as the graph: for ever.
int cudaUserObjectCreate(void **out) {
    *out = (void *)(uintptr_t)(16 * fresh_id());
    return SUCCESS;
}
int cudaUserObjectRetain(void) { return SUCCESS; }
int cudaUserObjectRelease(void) { return SUCCESS; }
int cudaGraphRetainUserObject(void) { return SUCCESS; }

// ---- the driver's

int cuStreamIsCapturing(void *stream, int *status) { return cudaStreamIsCapturing(stream, status); }
int cuStreamBeginCapture_v2(void *stream) { return cudaStreamBeginCapture(stream); }
int cuStreamEndCapture(void *stream, void **graph) { return cudaStreamEndCapture(stream, graph); }
int cuStreamGetCaptureInfo_v2(void *stream, int *status, unsigned long long *id, void **graph,
                              const void **dependencies, size_t *count) {
    return cudaStreamGetCaptureInfo(stream, status, id, graph, dependencies, NULL, count);
}
int cuStreamGetCaptureInfo_v3(void *stream, int *status, unsigned long long *id, void **graph,
                              const void **dependencies, const void **edges, size_t *count) {
    return cudaStreamGetCaptureInfo(stream, status, id, graph, dependencies, edges, count);
}
int cuThreadExchangeStreamCaptureMode(int *mode) {
    return cudaThreadExchangeStreamCaptureMode(mode);
}
int cuGraphLaunch(void *graph, void *stream) { return cudaGraphLaunch(graph, stream); }
int cuGraphDestroy(void) { return SUCCESS; }
int cuGraphExecDestroy(void) { return SUCCESS; }
int cuGraphInstantiateWithFlags(void **out, void *graph) {
    *out = graph;
    return SUCCESS;
}
int cuGraphGetNodes(const Capture *graph, void **nodes, size_t *count) {
    return cudaGraphGetNodes(graph, nodes, count);
}
