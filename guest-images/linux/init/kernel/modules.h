// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#pragma once

// Loads the modules of a directory in the order that its file `order` says.
void load_modules(const char *directory);

// Loads the one in this file. 0, or errno.
int load_module(const char *path);
