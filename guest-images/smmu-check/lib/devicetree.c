// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#include "lib/devicetree.h"
#include "lib/memory.h"

enum { MAGIC = 0xd00dfeed, BEGIN_NODE = 1, END_NODE = 2, PROPERTY = 3, NOTHING = 4, MOST_LEVELS = 8 };

struct header {
    u32 magic, size, structure, strings, reserved_memory, version, compatible_version, cpu, strings_size, structure_size;
};

static const char *structure, *structure_end, *strings;

u32 cell(const void *property, unsigned index)
{
    return __builtin_bswap32(((const u32 *)property)[index]);
}

bool devicetree_init(u64 address)
{
    const struct header *header = (const void *)(uintptr_t)address;

    if (!address || cell(&header->magic, 0) != MAGIC)
        return false;
    structure = (const char *)header + cell(&header->structure, 0);
    structure_end = structure + cell(&header->structure_size, 0);
    strings = (const char *)header + cell(&header->strings, 0);
    return true;
}

static bool equal(const char *a, const char *b)
{
    while (*a && *a == *b) {
        a++;
        b++;
    }
    return *a == *b;
}

static u32 length_of(const char *text)
{
    u32 length = 0;

    while (text[length])
        length++;
    return length;
}

// Whether a list of NUL-terminated strings contains this one.
static bool lists(const char *list, u32 length, const char *wanted)
{
    for (u32 at = 0; at < length; at += length_of(list + at) + 1)
        if (equal(list + at, wanted))
            return true;
    return false;
}

// An open node.
struct level {
    bool is_wanted;
    const void *property;
    u32 length;
};

// Of any node, if neither is given.
static const void *find(const char *compatible, const char *node, const char *name, u32 *length)
{
    struct level levels[MOST_LEVELS];
    int depth = -1;

    for (const char *at = structure; at < structure_end;) {
        u32 token = cell(at, 0);

        at += 4;
        if (token == BEGIN_NODE) {
            if (++depth == MOST_LEVELS)
                return NULL;
            levels[depth] = (struct level){.is_wanted = node ? equal(at, node) : !compatible};
            at += (length_of(at) + 4) & ~3u;
        } else if (token == PROPERTY) {
            u32 size = cell(at, 0);
            const char *called = strings + cell(at, 1), *value = at + 8;

            if (compatible && equal(called, "compatible") && lists(value, size, compatible))
                levels[depth].is_wanted = true;
            if (equal(called, name)) {
                levels[depth].property = value;
                levels[depth].length = size;
            }
            at = value + ((size + 3) & ~3u);
        } else if (token == END_NODE) {
            if (levels[depth].is_wanted && levels[depth].property) {
                *length = levels[depth].length;
                return levels[depth].property;
            }
            depth--;
        } else if (token != NOTHING) {
            return NULL;
        }
    }
    return NULL;
}

const void *property_of_compatible(const char *compatible, const char *name, u32 *length)
{
    return find(compatible, NULL, name, length);
}

const void *property_of_node(const char *node, const char *name, u32 *length)
{
    return find(NULL, node, name, length);
}

const void *property_anywhere(const char *name, u32 *length)
{
    return find(NULL, NULL, name, length);
}

bool on_command_line(const char *word)
{
    u32 length, size = length_of(word);
    const char *line = property_of_node("chosen", "bootargs", &length);

    for (const char *at = line; at && *at;) {
        const char *end = at;

        while (*end && *end != ' ')
            end++;
        if ((u32)(end - at) == size && memcmp(at, word, size) == 0)
            return true;
        at = *end ? end + 1 : end;
    }
    return false;
}

u64 address_of(const char *compatible)
{
    u32 length;
    const void *reg = property_of_compatible(compatible, "reg", &length);

    return reg && length >= 16 ? (u64)cell(reg, 0) << 32 | cell(reg, 1) : 0;
}
