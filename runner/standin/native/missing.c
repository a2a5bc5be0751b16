// Functions that are not stood in: each fails by its name, and entry points that are looked up.
#include "standin.h"
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static const char **called; // distinct names, by first call
static size_t called_count, called_room;

static int note(const char *name) {
    for (size_t i = 0; i < called_count; i++)
        if (!strcmp(called[i], name)) return 0;
    if (called_count == called_room) {
        called_room = called_room ? 2 * called_room : 64;
        const char **moved = realloc(called, called_room * sizeof *called);
        if (!moved) abort();
        called = moved;
    }
    called[called_count++] = name;
    return 1;
}

// For the process that started all this: it cannot ask the library of its children.
static void tell(const char *name) {
    fprintf(stderr, "stand-in GPU: %s is not stood in\n", name);
    const char *path = getenv("DEEPGEMM_STANDIN_FAILURES");
    int file = path && *path ? open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666) : -1;
    if (file < 0) return;
    char line[256];
    int length = snprintf(line, sizeof line, "%s\n", name);
    if (length < (int)sizeof line && write(file, line, (size_t)length) != length)
        fprintf(stderr, "stand-in GPU: cannot write %s\n", path);
    close(file);
}

// Name must live as long as the process: a literal, or an entry point's.
int missing(const char *name, int status) {
    pthread_mutex_lock(&lock);
    int is_new = note(name);
    pthread_mutex_unlock(&lock);
    if (is_new) tell(name);
    return strncmp(name, "cuda", 4) ? status : failed_with(status);
}

// Names of functions that were called and are not stood in, a line each. Returns the length of the
// whole text; what does not fit into `capacity`, with its closing 0, is left out.
int standin_failed(char *out, int capacity) {
    size_t length = 0;
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < called_count; i++) {
        size_t bytes = strlen(called[i]);
        if (length + bytes + 2 <= (size_t)(capacity > 0 ? capacity : 0)) {
            memcpy(out + length, called[i], bytes);
            memcpy(out + length + bytes, "\n", 2);
        }
        length += bytes + 1;
    }
    pthread_mutex_unlock(&lock);
    if (!length && capacity > 0) *out = 0;
    return (int)length;
}

// ---- entry points that are looked up by name

// A name that we have never heard of gets one of these, so that only a call of it fails.
enum { POOL = 0x100 };
static char *pooled[POOL];
static int pooled_count;

// clang-format off
#define EACH(M, n) M(n##0) M(n##1) M(n##2) M(n##3) M(n##4) M(n##5) M(n##6) M(n##7) \
    M(n##8) M(n##9) M(n##a) M(n##b) M(n##c) M(n##d) M(n##e) M(n##f)
#define ALL(M) EACH(M, 0) EACH(M, 1) EACH(M, 2) EACH(M, 3) EACH(M, 4) EACH(M, 5) EACH(M, 6) \
    EACH(M, 7) EACH(M, 8) EACH(M, 9) EACH(M, a) EACH(M, b) EACH(M, c) EACH(M, d) EACH(M, e) \
    EACH(M, f)
#define DEFINE(n) static int pool_##n(void) { return missing(pooled[0x##n], NOT_SUPPORTED); }
#define NAME(n) pool_##n,
ALL(DEFINE)
static int (*const pool[POOL])(void) = {ALL(NAME)};
// clang-format on

static void *pooled_function(const char *name) {
    int i = 0;
    pthread_mutex_lock(&lock);
    while (i < pooled_count && strcmp(pooled[i], name)) i++;
    if (i == pooled_count && i < POOL && (pooled[i] = strdup(name))) pooled_count++;
    pthread_mutex_unlock(&lock);
    return i < pooled_count ? (void *)pool[i] : NULL;
}

static void *own_library(void) {
    static void *self;
    Dl_info info;
    if (!self && dladdr((void *)own_library, &info))
        self = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    return self;
}

static int by_name(const void *name, const void *stub) {
    return strcmp(name, ((const Stub *)stub)->name);
}

// The function of that very name, NULL where we define none: a stub fills its place then.
static void *stood_in(const char *name) {
    void *function = dlsym(own_library(), name);
    const Stub *stub =
        bsearch(name, standin_stubs, (size_t)standin_stub_count, sizeof *stub, by_name);
    return stub && (void *)stub->function == function ? NULL : function;
}

// The driver gives its functions numbers as their parameters change; a caller asks by the plain
// name and the version of CUDA that it was built for.
static const struct {
    const char *name, *edition;
    int since;
} editions[] = {
    {"cuStreamGetCaptureInfo", "cuStreamGetCaptureInfo_v3", 12030},
    {"cuStreamGetCaptureInfo", "cuStreamGetCaptureInfo_v2", 11030},
    {"cuCtxCreate", "cuCtxCreate_v4", 12050},
};

void *entry_point(const char *name, int version) {
    char second[128];
    void *found = NULL;
    for (size_t i = 0; i < sizeof editions / sizeof *editions && !found; i++)
        if (!strcmp(name, editions[i].name) && (!version || version >= editions[i].since))
            found = stood_in(editions[i].edition);
    snprintf(second, sizeof second, "%s_v2", name);
    if (!found) found = stood_in(second);
    if (!found) found = stood_in(name);
    if (!found) found = dlsym(own_library(), name);
    return found ? found : pooled_function(name);
}

enum { FOUND = 0, SYMBOL_NOT_FOUND = 1 };

int cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                     unsigned long long flags, int *result) {
    *function = entry_point(name, (int)version);
    if (result) *result = *function ? FOUND : SYMBOL_NOT_FOUND;
    return SUCCESS;
}
int cudaGetDriverEntryPoint(const char *name, void **function, unsigned long long flags,
                            int *result) {
    return cudaGetDriverEntryPointByVersion(name, function, 0, flags, result);
}
int cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags,
                        int *result) {
    return cudaGetDriverEntryPointByVersion(name, function, (unsigned)version, flags, result);
}
int cuGetProcAddress(const char *name, void **function, int version) {
    return cudaGetDriverEntryPointByVersion(name, function, (unsigned)version, 0, NULL);
}
