package main

import (
	"bufio"
	"bytes"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// unitDirs are where systemd looks, the first that has a unit counts.
var unitDirs = []string{"etc/systemd/system", "run/systemd/system", "usr/local/lib/systemd/system", "usr/lib/systemd/system", "lib/systemd/system"}

// A unit is what the files of one set: section and key, the last one counts.
type unit struct {
	name, path string
	set        map[string]string
}

// readUnit reads a unit with its drop-ins; nil when there is none.
func (d *doctor) readUnit(name string) (*unit, error) {
	u := &unit{name: name, set: map[string]string{}}
	for _, dir := range unitDirs {
		path := filepath.Join(dir, name)
		text, err := os.ReadFile(d.at(path))
		if os.IsNotExist(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		u.path = "/" + path
		u.take(text)
		break
	}
	if u.path == "" {
		return nil, nil
	}
	dropIns := map[string]string{} // by file name: one in an earlier directory hides those in later ones
	for _, dir := range slices.Backward(unitDirs) {
		names, err := filepath.Glob(d.at(filepath.Join(dir, name+".d", "*.conf")))
		if err != nil {
			return nil, err
		}
		for _, n := range names {
			dropIns[filepath.Base(n)] = n
		}
	}
	for _, base := range slices.Sorted(maps.Keys(dropIns)) {
		text, err := os.ReadFile(dropIns[base])
		if err != nil {
			return nil, err
		}
		u.take(text)
	}
	return u, nil
}

// take reads the lines of a file.
func (u *unit) take(text []byte) {
	section := ""
	for lines := bufio.NewScanner(bytes.NewReader(text)); lines.Scan(); {
		line := strings.TrimSpace(lines.Text())
		switch {
		case line == "" || line[0] == '#' || line[0] == ';':
		case line[0] == '[':
			section = strings.Trim(line, "[]")
		default:
			key, value, _ := strings.Cut(line, "=")
			u.set[section+"."+strings.TrimSpace(key)] = strings.TrimSpace(value)
		}
	}
}

// A rule is what a unit should say.
type rule struct {
	key   string
	right func(value string) bool
	want  string // as in a unit
	level level
	why   string
}

func is(want ...string) func(string) bool {
	return func(v string) bool { return slices.Contains(want, v) }
}

// number accepts numbers between two others; infinity is the largest.
func number(least, most int64) func(string) bool {
	return func(v string) bool {
		n, err := strconv.ParseInt(v, 10, 64)
		return v == "infinity" && most > 1<<40 || err == nil && n >= least && n <= most
	}
}

// own are options that give a service mounts of its own.
var own = []string{
	"ProtectSystem", "ProtectHome", "PrivateTmp", "PrivateDevices", "PrivateMounts", "ProtectKernelTunables", "ProtectKernelModules", "ProtectKernelLogs", "ProtectControlGroups",
	"ReadOnlyPaths", "ReadWritePaths", "InaccessiblePaths", "TemporaryFileSystem", "BindPaths", "BindReadOnlyPaths", "RootDirectory", "RootImage", "DynamicUser", "ProtectProc", "MountFlags",
}

const endless = 1<<62 - 1

// mountRules are of every service that mounts, or starts who does.
func mountRules() []rule {
	rules := []rule{
		{"Service.KillMode", is("process"), "KillMode=process", failure, "a restart of the service would kill what containers read from"},
		{"Service.OOMScoreAdjust", number(-1000, -500), "OOMScoreAdjust=-900", warning, "when memory is short, what containers read from is killed before others"},
		{"Service.LimitNOFILE", number(1<<16, endless), "LimitNOFILE=1048576", warning, "there is a descriptor for each blob and each waiting read"},
		{"Service.Restart", is("always", "on-failure", "on-abnormal"), "Restart=always", warning, "after a crash nobody starts it again"},
		{"Service.Type", is("notify", "notify-reload"), "Type=notify", warning, "systemctl start would return before it answers"},
	}
	for _, key := range own {
		rules = append(rules, rule{"Service." + key, is("", "no", "false", "off", "0", "shared"), key + "= (nothing)", failure, "it gives the service mounts of its own: nobody else would see what it mounts"})
	}
	return rules
}

// unitRules are of a unit that doctor knows.
func unitRules(name string) []rule {
	switch name {
	case "erofsd.service":
		return append(mountRules(),
			rule{"Service.FileDescriptorStoreMax", number(1, endless), "FileDescriptorStoreMax=65536", failure, "images would not survive the death of keeper and worker"},
			rule{"Service.NotifyAccess", is("", "main", "exec", "all"), "NotifyAccess=main", warning, "systemd would not take the descriptors"},
			rule{"Unit.StartLimitIntervalSec", is("0", "0s", "infinity"), "StartLimitIntervalSec=0", warning, "when systemd gives up it lets go of what it keeps"},
		)
	case "containerd.service":
		return []rule{
			{"Service.KillMode", is("process"), "KillMode=process", warning, "a restart of containerd kills all containers"},
			{"Service.Delegate", is("yes", "true", "on", "1"), "Delegate=yes", warning, "systemd may move containers between cgroups"},
		}
	case "nydus-snapshotter.service":
		return mountRules()[:1] // KillMode
	}
	return mountRules()
}

// examineUnits finds settings of services that harm.
func (d *doctor) examineUnits() {
	for _, name := range []string{"erofsd.service", "containerd-erofsd-grpc.service", "nydus-snapshotter.service", "containerd.service"} {
		u, err := d.readUnit(name)
		if err != nil {
			d.add(failure, "unit", "correct the file", "%s: %v", name, err)
		}
		if u == nil {
			continue
		}
		right := true
		for _, r := range unitRules(name) {
			if r.right(u.set[r.key]) {
				continue
			}
			right = false
			section, key, _ := strings.Cut(r.key, ".")
			d.add(r.level, "unit", fmt.Sprintf("systemctl edit %s:\n[%s]\n%s", name, section, r.want), "%s has %s=%s: %s", u.path, key, u.set[r.key], r.why)
		}
		if right {
			d.add(fine, "unit", "", "%s", u.path)
		}
	}
}
