// Command erofsd is the daemon: it mounts lazy images through the kernel's
// EROFS and brings their data when they are read. Its command line and API are
// nydusd's too.
package main

import (
	"os"

	"github.com/erofsd/erofsd/internal/erofsd"
)

func main() { os.Exit(erofsd.Main()) }
