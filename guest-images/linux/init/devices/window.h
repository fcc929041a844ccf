// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Gigabytes of addresses with little memory behind them, which is there many times: huge pages of
// 2 MiB in random order, and a piece of ordinary pages of 4 KiB.
#pragma once

#include <stdbool.h>
#include <stdint.h>

enum { WINDOW_PAGE = 4096, WINDOW_SLOT = 2 << 20, WINDOW_HUGE = 6 };
// Pages of all memory, those of the ordinary piece last.
enum { WINDOW_PAGES = (WINDOW_HUGE + 1) * (WINDOW_SLOT / WINDOW_PAGE) };

struct window {
    char *memory;           // all of it, once
    char *huge;             // HUGE_SIZE of addresses
    char *ordinary;         // ORDINARY_SIZE of addresses
    unsigned char *order;   // which huge page is in each slot
};

#define WINDOW_HUGE_SIZE ((UINT64_C(1) << 30) + WINDOW_SLOT)
#define WINDOW_ORDINARY_SIZE (UINT64_C(2) * WINDOW_SLOT)

// NULL, or the error; must be closed in any case.
const char *window_open(struct window *window, uint64_t seed);
void window_close(struct window *window);

// The number of the page of memory that is at an address of the window.
unsigned window_page(const struct window *window, const char *address);

// The address of a page in `memory`.
static inline char *window_memory(const struct window *window, unsigned page)
{
    return window->memory + (uint64_t)page * WINDOW_PAGE;
}
