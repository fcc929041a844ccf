// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#pragma once

// Loads the modules of /modules in the order that /modules/order says.
void load_modules(void);

// Loads the one in this file. 0, or errno.
int load_module(const char *path);
