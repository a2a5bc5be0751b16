// Streams and events: work is over as soon as it is asked for.
#include "standin.h"
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct {
    double seconds;
    Capture *capture;
} Event;
typedef struct {
    int status;
    char rest[60];
} EventHandle;

unsigned long long fresh_id(void) {
    static unsigned long long last;
    return __atomic_add_fetch(&last, 1, __ATOMIC_RELAXED);
}

// 0, 1 and 2 are the default streams, which never capture.
Stream *stream_of(const void *handle) { return (uintptr_t)handle > 2 ? (Stream *)handle : NULL; }

Capture *capture_of(const void *handle) {
    Stream *stream = stream_of(handle);
    Capture *capture = stream ? __atomic_load_n(&stream->capture, __ATOMIC_ACQUIRE) : NULL;
    return capture && __atomic_load_n(&capture->active, __ATOMIC_ACQUIRE) ? capture : NULL;
}
int is_capturing(const void *stream) { return capture_of(stream) != NULL; }
void note_work(void *stream) {
    Capture *capture = capture_of(stream);
    if (capture) __atomic_add_fetch(&capture->nodes, 1, __ATOMIC_RELAXED);
}

// ---- streams

int cudaStreamCreateWithPriority(void **out, unsigned flags, int priority) {
    Stream *stream = malloc(sizeof *stream);
    if (!stream) return failed_with(OUT_OF_MEMORY);
    *stream = (Stream){current_device, priority, flags, 16 + fresh_id(), NULL};
    *out = stream;
    return SUCCESS;
}
int cudaStreamCreateWithFlags(void **out, unsigned flags) {
    return cudaStreamCreateWithPriority(out, flags, 0);
}
int cudaStreamCreate(void **out) { return cudaStreamCreateWithPriority(out, 0, 0); }
int cudaStreamDestroy(void *stream) {
    free(stream_of(stream));
    return SUCCESS;
}
int cudaStreamSynchronize(void *stream) {
    return failed_with(is_capturing(stream) ? CAPTURE_UNSUPPORTED : SUCCESS);
}
int cudaStreamQuery(void *stream) { return cudaStreamSynchronize(stream); }
int cudaStreamGetPriority(void *handle, int *priority) {
    Stream *stream = stream_of(handle);
    *priority = stream ? stream->priority : 0;
    return SUCCESS;
}
int cudaStreamGetFlags(void *handle, unsigned *flags) {
    Stream *stream = stream_of(handle);
    *flags = stream ? stream->flags : 0;
    return SUCCESS;
}
int cudaStreamGetId(void *handle, unsigned long long *id) {
    Stream *stream = stream_of(handle);
    *id = stream ? stream->id : (unsigned long long)(uintptr_t)handle;
    return SUCCESS;
}
int cudaStreamGetDevice(void *handle, int *device) {
    Stream *stream = stream_of(handle);
    *device = stream ? stream->device : current_device;
    return SUCCESS;
}
int cudaStreamAttachMemAsync(void) { return SUCCESS; }
int cudaCtxResetPersistingL2Cache(void) { return SUCCESS; }

// A host function runs at once; a captured one would run with its graph, and graphs do nothing.
int cudaLaunchHostFunc(void *stream, void (*function)(void *), void *data) {
    note_work(stream);
    if (!is_capturing(stream)) function(data);
    return SUCCESS;
}
int cudaStreamAddCallback(void *stream, void (*function)(void *, int, void *), void *data) {
    if (is_capturing(stream)) return failed_with(CAPTURE_UNSUPPORTED);
    function(stream, SUCCESS, data);
    return SUCCESS;
}

// ---- events

static double now(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return (double)at.tv_sec + 1e-9 * (double)at.tv_nsec;
}
int cudaEventCreateWithFlags(void **out) {
    *out = calloc(1, sizeof(Event));
    return failed_with(*out ? SUCCESS : OUT_OF_MEMORY);
}
int cudaEventCreate(void **out) { return cudaEventCreateWithFlags(out); }
int cudaEventDestroy(void *event) {
    free(event);
    return SUCCESS;
}
int cudaEventRecord(Event *event, void *stream) {
    event->capture = capture_of(stream);
    event->seconds = now();
    return SUCCESS;
}
int cudaEventRecordWithFlags(Event *event, void *stream) { return cudaEventRecord(event, stream); }
int cudaEventQuery(Event *event) {
    return failed_with(event->capture && event->capture->active ? CAPTURE_UNSUPPORTED : SUCCESS);
}
int cudaEventSynchronize(Event *event) { return cudaEventQuery(event); }
int cudaEventElapsedTime(float *milliseconds, const Event *start, const Event *end) {
    double passed = 1e3 * (end->seconds - start->seconds);
    *milliseconds = (float)(passed > 1e-3 ? passed : 1e-3);
    return SUCCESS;
}
int cudaIpcGetEventHandle(EventHandle *handle) {
    memset(handle, 0, sizeof *handle);
    return SUCCESS;
}
int cudaIpcOpenEventHandle(void **out) { return cudaEventCreateWithFlags(out); }

// A stream that waits for an event of a capturing one joins its capture.
int cudaStreamWaitEvent(void *handle, Event *event) {
    Stream *stream = stream_of(handle);
    if (stream && event->capture && event->capture->active)
        __atomic_store_n(&stream->capture, event->capture, __ATOMIC_RELEASE);
    return SUCCESS;
}

// ---- the driver's

int cuStreamCreate(void **out, unsigned flags) {
    return cudaStreamCreateWithPriority(out, flags, 0);
}
int cuStreamCreateWithPriority(void **out, unsigned flags, int priority) {
    return cudaStreamCreateWithPriority(out, flags, priority);
}
int cuStreamDestroy_v2(void *stream) { return cudaStreamDestroy(stream); }
int cuStreamSynchronize(void *stream) { return cudaStreamSynchronize(stream); }
int cuStreamQuery(void *stream) { return cudaStreamQuery(stream); }
int cuStreamGetPriority(void *stream, int *priority) {
    return cudaStreamGetPriority(stream, priority);
}
int cuStreamGetFlags(void *stream, unsigned *flags) { return cudaStreamGetFlags(stream, flags); }
int cuStreamGetId(void *stream, unsigned long long *id) { return cudaStreamGetId(stream, id); }
int cuStreamGetDevice(void *stream, int *device) { return cudaStreamGetDevice(stream, device); }
int cuStreamWaitEvent(void *stream, Event *event) { return cudaStreamWaitEvent(stream, event); }
int cuStreamGetCtx(void *stream, void **context) {
    int device;
    cudaStreamGetDevice(stream, &device);
    *context = handle_of(CONTEXT_TAG, (uint32_t)device);
    return SUCCESS;
}
int cuStreamWriteValue32_v2(void *stream, unsigned *at, unsigned value) {
    note_work(stream);
    *at = value;
    return SUCCESS;
}
int cuStreamWaitValue32_v2(void *stream) {
    note_work(stream);
    return SUCCESS;
}
int cuLaunchHostFunc(void *stream, void (*function)(void *), void *data) {
    return cudaLaunchHostFunc(stream, function, data);
}
int cuEventCreate(void **out) { return cudaEventCreateWithFlags(out); }
int cuEventDestroy_v2(void *event) { return cudaEventDestroy(event); }
int cuEventRecord(Event *event, void *stream) { return cudaEventRecord(event, stream); }
int cuEventQuery(Event *event) { return cudaEventQuery(event); }
int cuEventSynchronize(Event *event) { return cudaEventSynchronize(event); }
int cuEventElapsedTime(float *milliseconds, const Event *start, const Event *end) {
    return cudaEventElapsedTime(milliseconds, start, end);
}
int cuEventElapsedTime_v2(float *milliseconds, const Event *start, const Event *end) {
    return cudaEventElapsedTime(milliseconds, start, end);
}
