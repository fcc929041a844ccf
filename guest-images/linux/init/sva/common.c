// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../../pattern.h"
#include "../devices/edu_sva.h"
#include "cases.h"

void *sva_map(size_t size)
{
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (memory == MAP_FAILED)
        _exit(1);
    return memory;
}

const char *sva_holds(const void *memory, size_t size, unsigned seed)
{
    size_t wrong = pattern_check(memory, size, seed, 0);

    if (wrong == size)
        return NULL;
    return sva_error("the word at %#zx of %#zx is not that of seed %u", wrong, size, seed);
}

const char *sva_copies(int file, const void *from, void *to, size_t size, unsigned seed)
{
    int error = sva_copy(file, from, to, size);

    return error ? strerror(error) : sva_holds(to, size, seed);
}

unsigned long sva_mapped(const void *memory, const char *what)
{
    unsigned long start, end, found = 0, address = (unsigned long)memory;
    char line[256];
    bool is_it = false;
    FILE *file = fopen("/proc/self/smaps", "re");

    while (file && fgets(line, sizeof(line), file)) {
        if (sscanf(line, "%lx-%lx ", &start, &end) == 2)
            is_it = start <= address && address < end;
        else if (is_it && sscanf(line, what, &found) == 1)
            break;
    }
    if (file)
        fclose(file);
    return found;
}
