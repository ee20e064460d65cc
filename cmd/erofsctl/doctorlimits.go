package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
)

// A sysctl is a limit of the kernel, and why it should be no lower.
type sysctl struct {
	name  string // with slashes
	least int64
	why   string
}

var limits = []sysctl{
	{"fs/nr_open", 1 << 20, "erofsd has a descriptor for each blob and each waiting read"},
	{"fs/file-max", 1 << 20, "all processes together have so many files"},
	{"fs/fanotify/max_user_groups", 16, "erofsd has a group, and its probes"},
	{"fs/inotify/max_user_instances", 128, "containerd and the kubelet watch files; without it pods fail to start"},
}

// examineLimits finds limits that are too low.
func (d *doctor) examineLimits() {
	right := true
	for _, l := range limits {
		text, err := os.ReadFile(d.at("proc/sys/" + l.name))
		if err != nil {
			continue // this kernel has no such limit
		}
		n, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
		if err != nil { // file-max may be larger than that
			continue
		}
		if n < l.least {
			right = false
			d.add(warning, "limits", fmt.Sprintf("sysctl -w %s=%d; and in /etc/sysctl.d for ever", strings.ReplaceAll(l.name, "/", "."), l.least), "%s is %d: %s", strings.ReplaceAll(l.name, "/", "."), n, l.why)
		}
	}
	if right {
		d.add(fine, "limits", "", "descriptors, fanotify and inotify have room")
	}
}
