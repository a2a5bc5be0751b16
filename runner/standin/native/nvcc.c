// Stands in for nvcc: compiles nothing, and writes down what it was asked for.
//
// The text of --version goes into cache keys, so it is given out to the byte. A compile leaves a
// placeholder that is not empty, which is all that the library looks at before it loads it.
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int fail(const char *what, const char *name) {
    fprintf(stderr, "stand-in nvcc: %s %s\n", what, name);
    return 1;
}

static int print_version(void) {
    const char *path = getenv("DEEPGEMM_STANDIN_VERSION_FILE");
    FILE *file = path ? fopen(path, "rb") : NULL;
    if (!file) return fail("cannot read", path ? path : "DEEPGEMM_STANDIN_VERSION_FILE");
    char buffer[4096];
    for (size_t bytes; (bytes = fread(buffer, 1, sizeof buffer, file));)
        fwrite(buffer, 1, bytes, stdout);
    fclose(file);
    return 0;
}

// One line in one write, so that compiles that run at a time do not mix their lines.
static int record(int count, char **words, const char *path) {
    size_t length = 0, used = 0;
    for (int i = 0; i < count; i++) length += strlen(words[i]) + 1;
    char *line = malloc(length);
    int file = line ? open(path, O_WRONLY | O_APPEND | O_CREAT, 0666) : -1;
    if (file < 0) return fail("cannot write", path);
    for (int i = 0; i < count; i++) {
        size_t bytes = strlen(words[i]);
        memcpy(line + used, words[i], bytes);
        for (size_t at = used; at < used + bytes; at++)
            if (line[at] == '\n') line[at] = ' ';
        used += bytes;
        line[used++] = i + 1 < count ? '\x1f' : '\n';
    }
    int whole = write(file, line, length) == (ssize_t)length;
    close(file);
    free(line);
    return whole ? 0 : fail("cannot write", path);
}

int main(int count, char **words) {
    const char *out = NULL, *records = getenv("DEEPGEMM_STANDIN_COMPILES");
    for (int i = 1; i < count; i++) {
        if (!strcmp(words[i], "--version") || !strcmp(words[i], "-V")) return print_version();
        if (!strcmp(words[i], "--dryrun") || !strcmp(words[i], "-dryrun"))
            return fail("has no stages for", words[i]);
        int names_output = !strcmp(words[i], "-o") || !strcmp(words[i], "--output-file");
        if (names_output && i + 1 < count) out = words[i + 1];
    }
    if (!out) return fail("compiles to a file: missing", "-o or --output-file");
    FILE *cubin = fopen(out, "wb");
    if (!cubin || fputs("stand-in cubin", cubin) < 0 || fclose(cubin))
        return fail("cannot write", out);
    return records && *records ? record(count, words, records) : 0;
}
