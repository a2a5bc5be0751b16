// Loaded libraries and the log of their launches, which the walker drains.
//
// A kernel's handle carries the index of its library, so that a launch is noted without a search.
#include "standin.h"
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

typedef struct {
    const char *path;
} Loaded; // the path is empty where data was loaded

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Loaded *loaded;
static uint32_t loaded_count, loaded_room;
static uint32_t *log_entries; // a queue: taken from `log_first` on, appended at `log_end`
static size_t log_first, log_end, log_room;

static void *grown(void *array, size_t room, size_t bytes) {
    void *moved = realloc(array, room * bytes);
    if (!moved) abort();
    return moved;
}

static void *library_of(const char *path) {
    char *kept = strdup(path);
    if (!kept) abort();
    pthread_mutex_lock(&lock);
    if (loaded_count == loaded_room) {
        loaded_room = loaded_room ? 2 * loaded_room : 256;
        loaded = grown(loaded, loaded_room, sizeof *loaded);
    }
    uint32_t index = loaded_count++;
    loaded[index].path = kept;
    pthread_mutex_unlock(&lock);
    return handle_of(LIBRARY_TAG, index);
}
void *library_of_data(void) { return library_of(""); }
void *library_of_file(const char *path, int *error) {
    struct stat status;
    *error = stat(path, &status) ? FILE_NOT_FOUND : status.st_size ? SUCCESS : INVALID_IMAGE;
    return *error ? NULL : library_of(path);
}
int is_library(const void *handle) { return handle_is(LIBRARY_TAG, handle); }
void *kernel_of(const void *library) { return handle_of(KERNEL_TAG, handle_index(library)); }

static void append(uint32_t index) {
    if (log_end == log_room) {
        log_room = log_room ? 2 * log_room : 1024;
        log_entries = grown(log_entries, log_room, sizeof *log_entries);
    }
    log_entries[log_end++] = index;
}
void note_launch(const void *kernel, void *stream) {
    note_work(stream);
    if (!handle_is(KERNEL_TAG, kernel)) return; // a kernel of torch's own
    uint32_t index = handle_index(kernel);
    pthread_mutex_lock(&lock);
    if (index < loaded_count && *loaded[index].path) append(index);
    pthread_mutex_unlock(&lock);
}

// Takes the oldest launches out of the log, at most `capacity`: indices of libraries that were
// loaded from files, in order of the launches. Returns how many; the rest waits for the next call.
int standin_launches(uint32_t *out, int capacity) {
    pthread_mutex_lock(&lock);
    size_t count = log_end - log_first, room = capacity > 0 ? (size_t)capacity : 0;
    if (count > room) count = room;
    if (count) memcpy(out, log_entries + log_first, count * sizeof *out);
    log_first += count;
    if (log_first == log_end) log_first = log_end = 0;
    pthread_mutex_unlock(&lock);
    return (int)count;
}

// The path that a library was loaded from, empty for one loaded from memory, NULL for none.
const char *standin_loaded(uint32_t index) {
    pthread_mutex_lock(&lock);
    const char *path = index < loaded_count ? loaded[index].path : NULL;
    pthread_mutex_unlock(&lock);
    return path;
}
