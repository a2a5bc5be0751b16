// The numbers of the GPU, from variables that the starter of the process sets (build.py).
#include "standin.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#define PREFIX "DEEPGEMM_STANDIN_"

static Settings set;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static long long number(const char *name) {
    const char *text = getenv(name);
    if (text && *text) return strtoll(text, NULL, 10);
    fprintf(stderr, "stand-in GPU: %s is not set: start the process with runner standin\n", name);
    return 0;
}

static int number_of_devices(void) {
    long long devices = number(PREFIX "DEVICES");
    return devices > MOST_DEVICES ? MOST_DEVICES : (int)devices;
}

// CUDA_VISIBLE_DEVICES is read late, with the first question, as the real runtime does. What is no
// index, a UUID for one, stands for the device of its place; an index that is none ends the list.
static void choose_visible(const char *text) {
    set.devices = 0;
    while (text && *text && set.devices < set.physical_devices) {
        char *end;
        long index = strtol(text, &end, 10);
        if (end == text) index = set.devices;
        if (*text == '-' || index >= set.physical_devices || !strncasecmp(text, "NoDev", 5)) return;
        set.physical[set.devices++] = (int)index;
        text = strchr(text, ',');
        if (text) text++;
    }
}

static void read_settings(void) {
    const char *name = getenv(PREFIX "NAME"), *visible = getenv("CUDA_VISIBLE_DEVICES");
    snprintf(set.name, sizeof set.name, "%s", name ? name : "stand-in");
    set.major = (int)number(PREFIX "MAJOR");
    set.minor = (int)number(PREFIX "MINOR");
    set.sms = (int)number(PREFIX "SMS");
    set.threads_per_sm = (int)number(PREFIX "THREADS_PER_SM");
    set.l2 = (int)number(PREFIX "L2");
    set.shared_optin = (int)number(PREFIX "SHARED_OPTIN");
    set.shared_per_sm = (int)number(PREFIX "SHARED_PER_SM");
    set.memory = (size_t)number(PREFIX "MEMORY");
    set.cuda_version = (int)number(PREFIX "CUDA_VERSION");
    set.physical_devices = set.devices = number_of_devices();
    for (int i = 0; i < MOST_DEVICES; i++) set.physical[i] = i;
    if (visible) choose_visible(visible);
}

const Settings *settings(void) {
    pthread_once(&once, read_settings);
    return &set;
}
