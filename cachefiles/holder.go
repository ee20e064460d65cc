package cachefiles

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// maxHolders bounds how many processes an error names.
const maxHolders = 4

// holders names, after a colon, the processes that have the file path open, as far as the
// process table at proc tells; who a daemon passed its descriptor to is among them.
func holders(proc, path string) string {
	fds, _ := filepath.Glob(filepath.Join(proc, "[0-9]*", "fd", "*")) // the pattern is right
	var found []string
	for _, fd := range fds {
		if target, rerr := os.Readlink(fd); rerr != nil || target != path {
			continue
		}
		process := filepath.Dir(filepath.Dir(fd))
		name, rerr := os.ReadFile(filepath.Join(process, "comm"))
		if rerr != nil {
			continue // it has ended
		}
		text := fmt.Sprintf("%s, process %s", strings.TrimSpace(string(name)), filepath.Base(process))
		if !slices.Contains(found, text) && len(found) < maxHolders {
			found = append(found, text)
		}
	}
	if len(found) == 0 {
		return ""
	}
	return ": " + strings.Join(found, "; ")
}
