// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#include "cmdline.h"
#include "memory.h"

#define MULTIBOOT_MAGIC 0x2badb002u
#define MULTIBOOT_HAS_CMDLINE BIT(2)
#define PVH_MAGIC 0x336ec578u

struct multiboot_info {
    u32 flags, memory_lower, memory_upper, boot_device, cmdline;
};

struct hvm_start_info {
    u32 magic, version, flags, module_count;
    u64 modules, cmdline;
};

static const char *cmdline = "";
static bool by_multiboot;

void cmdline_init(u32 magic, u64 start_info)
{
    if (magic == MULTIBOOT_MAGIC) {
        const struct multiboot_info *info = (const void *)(uintptr_t)start_info;

        by_multiboot = true;
        if (info->flags & MULTIBOOT_HAS_CMDLINE)
            cmdline = (const char *)(uintptr_t)info->cmdline;
    } else {
        const struct hvm_start_info *info = (const void *)(uintptr_t)start_info;

        if (info->magic == PVH_MAGIC && info->cmdline)
            cmdline = (const char *)(uintptr_t)info->cmdline;
    }
}

const char *boot_protocol(void)
{
    return by_multiboot ? "multiboot" : "PVH";
}

static int digit(char c, unsigned base)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    if (base == 16 && c >= 'a' && c <= 'f')
        return c - 'a' + 10;
    if (base == 16 && c >= 'A' && c <= 'F')
        return c - 'A' + 10;
    return -1;
}

static u64 parse_number(const char *text)
{
    unsigned base = 10;
    u64 value = 0;

    if (text[0] == '0' && (text[1] == 'x' || text[1] == 'X')) {
        base = 16;
        text += 2;
    }
    for (; digit(*text, base) >= 0; text++)
        value = value * base + (u64)digit(*text, base);
    return value;
}

u64 cmdline_number(const char *name, u64 fallback)
{
    const char *word = cmdline;

    while (*word) {
        const char *wanted = name, *c = word;

        while (*wanted && *c == *wanted) {
            c++;
            wanted++;
        }
        if (!*wanted && *c == '=')
            return parse_number(c + 1);
        while (*word && *word != ' ')
            word++;
        while (*word == ' ')
            word++;
    }
    return fallback;
}
