package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/erofsd/erofsd/configs"
	"github.com/erofsd/erofsd/internal/kernel"
	"github.com/erofsd/erofsd/internal/testenv"
)

// healthy are the files of a machine with which nothing is wrong.
func healthy(t *testing.T) map[string]string {
	t.Helper()
	files := map[string]string{
		"proc/filesystems": "nodev\toverlay\n\text4\n", "proc/sys/fs/nr_open": "1048576\n", "proc/sys/fs/file-max": "9223372036854775807\n",
		"proc/sys/fs/fanotify/max_user_groups": "128\n", "proc/sys/fs/inotify/max_user_instances": "128\n",
		"usr/lib/systemd/system/containerd.service": "[Service]\nKillMode=process\nDelegate=yes\n",
	}
	for name, file := range map[string]string{
		"etc/systemd/system/erofsd.service":                 "systemd/erofsd.service",
		"etc/systemd/system/containerd-erofsd-grpc.service": "systemd/containerd-erofsd-grpc.service",
		"etc/containerd/config.toml":                        "containerd/config-v3.toml",
	} {
		text, err := configs.File(file)
		if err != nil {
			t.Fatal(err)
		}
		files[name] = string(text)
	}
	return files
}

// write makes the files of the machine.
func (d *doctor) write(t *testing.T, files map[string]string) {
	t.Helper()
	for name, text := range files {
		if err := errors.Join(os.MkdirAll(filepath.Dir(d.at(name)), 0o755), os.WriteFile(d.at(name), []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
}

// newDoctor is one for a machine without any file.
func newDoctor(t *testing.T) *doctor {
	t.Helper()
	able := transport{"fanotify", nil, func(kernel.Version) string { return "" }}
	return &doctor{
		host: shortDir(t), root: "/var/lib/erofsd", daemon: "/run/erofsd/erofsd.sock", snapshotter: defaultAddress,
		system: "/run/containerd-erofsd/system.sock", containerd: "/etc/containerd/config.toml",
		client: &http.Client{}, now: time.Now, transports: []transport{able}, synced: func() (bool, error) { return true, nil },
		run: func(context.Context, ...string) (string, error) {
			return "containerd github.com/containerd/containerd/v2 v2.4.2 abc", nil
		},
	}
}

// of are the findings that are worse than a note.
func (d *doctor) of(levels ...level) (found []string) {
	for _, f := range d.findings {
		if slices.Contains(levels, f.Level) {
			found = append(found, f.Check+": "+f.Found+" > "+f.Do)
		}
	}
	return found
}

// TestDoctorHealthy: files as shipped, and services that answer, are all right.
func TestDoctorHealthy(t *testing.T) {
	d := newDoctor(t)
	d.write(t, healthy(t))
	for _, name := range []string{d.daemon, d.snapshotter, d.system} {
		path := d.at(name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		serveUnix(t, path, func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("{}")) })
	}
	if err := d.examine(t.Context()); err != nil {
		t.Fatal(err)
	}
	d.findings = slices.DeleteFunc(d.findings, func(f finding) bool { return f.Check == "sandbox" || f.Check == "cache" }) // this machine's
	if bad := d.of(note, warning, failure); len(bad) > 0 || len(d.findings) < 12 || d.worst() != fine {
		t.Errorf("%d findings, bad: %q", len(d.findings), bad)
	}
	var text, asJSON bytes.Buffer
	if err := errors.Join(d.report(&text, false), d.report(&asJSON, true)); err != nil {
		t.Fatal(err)
	}
	var told struct {
		Worst    string    `json:"worst"`
		Findings []finding `json:"findings"`
	}
	if err := json.Unmarshal(asJSON.Bytes(), &told); err != nil || told.Worst != "ok" || !slices.Equal(told.Findings, d.findings) {
		t.Errorf("%v in %s", err, asJSON.String())
	}
	if lines := strings.Count(text.String(), "\n"); lines != len(d.findings) {
		t.Errorf("%d lines for %d findings:\n%s", lines, len(d.findings), text.String())
	}
	left, err := filepath.Glob(d.at("erofsd-doctor-*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left over: %q, %v", left, err)
	}
}

// Each of these is one thing that is wrong, and what doctor says of it.
var illnesses = []struct {
	name    string
	spoil   func(d *doctor, files map[string]string)
	level   level
	check   string
	found   string
	remedy  string
	without []string // findings of these checks would be too much
}{
	{"no transport", func(d *doctor, _ map[string]string) {
		d.transports = []transport{{"fanotify", []func(string) error{func(string) error { return errors.New("CONFIG_X is missing") }}, nil}}
	}, failure, "kernel", "no transport works", "docs/operations.md", nil},
	{"old kernel", func(d *doctor, _ map[string]string) {
		d.transports[0].unsafe = func(kernel.Version) string { return "lacks a fix" }
	}, warning, "fanotify", "lacks a fix", "later kernel", nil},
	{"no overlayfs", func(_ *doctor, f map[string]string) { f["proc/filesystems"] = "\text4\n" }, failure, "overlayfs", "no overlayfs", "modprobe overlay", nil},
	{"few descriptors", func(_ *doctor, f map[string]string) { f["proc/sys/fs/nr_open"] = "1024\n" }, warning, "limits", "fs.nr_open is 1024", "sysctl -w fs.nr_open=1048576", nil},
	{"few watches", func(_ *doctor, f map[string]string) { f["proc/sys/fs/inotify/max_user_instances"] = "8\n" }, warning, "limits", "fs.inotify.max_user_instances is 8", "sysctl -w", nil},
	{"clock of 1970", func(d *doctor, _ map[string]string) { d.now = func() time.Time { return time.Unix(0, 0) } }, failure, "clock", "1970-01-01", "timedatectl", nil},
	{"clock alone", func(d *doctor, _ map[string]string) { d.synced = func() (bool, error) { return false, nil } }, warning, "clock", "nobody keeps it right", "timedatectl", nil},
	{
		"kill mode", func(_ *doctor, f map[string]string) {
			replace(f, "etc/systemd/system/containerd-erofsd-grpc.service", "KillMode=process\n", "")
		},
		failure, "unit", "containerd-erofsd-grpc.service has KillMode=:", "[Service]\nKillMode=process", nil,
	},
	{"kill mode by a drop-in", func(_ *doctor, f map[string]string) {
		f["etc/systemd/system/erofsd.service.d/a.conf"] = "# note\n[Service]\nKillMode = mixed\n"
	}, failure, "unit", "erofsd.service has KillMode=mixed", "systemctl edit erofsd.service", nil},
	{"no store", func(_ *doctor, f map[string]string) {
		f["etc/systemd/system/erofsd.service.d/a.conf"] = "[Service]\nFileDescriptorStoreMax=0\n"
	}, failure, "unit", "FileDescriptorStoreMax=0: images would not survive", "FileDescriptorStoreMax=65536", nil},
	{"killed first", func(_ *doctor, f map[string]string) {
		replace(f, "etc/systemd/system/erofsd.service", "OOMScoreAdjust=-900\n", "")
	}, warning, "unit", "OOMScoreAdjust=:", "OOMScoreAdjust=-900", nil},
	{"mounts of its own", func(_ *doctor, f map[string]string) {
		f["run/systemd/system/erofsd.service.d/x.conf"] = "[Service]\nProtectSystem=strict\n"
	}, failure, "unit", "ProtectSystem=strict: it gives the service mounts of its own", "ProtectSystem= (nothing)", nil},
	{"containerd's unit", func(_ *doctor, f map[string]string) {
		f["usr/lib/systemd/system/containerd.service"] = "[Service]\nKillMode=process\n"
	}, warning, "unit", "containerd.service has Delegate=:", "Delegate=yes", nil},
	{"nydus's unit", func(_ *doctor, f map[string]string) {
		f["etc/systemd/system/nydus-snapshotter.service"] = "[Service]\nExecStart=/x\n"
	}, failure, "unit", "nydus-snapshotter.service has KillMode=:", "KillMode=process", nil},
	{"dead daemon", func(d *doctor, _ map[string]string) { d.die(d.daemon) }, failure, "erofsd", "has ended", "systemctl start erofsd", nil},
	{"no containerd", func(d *doctor, _ map[string]string) {
		d.run = func(context.Context, ...string) (string, error) { return "", os.ErrNotExist }
	}, note, "containerd", "no program containerd", "", nil},
	{"old containerd", func(d *doctor, _ map[string]string) {
		d.run = func(context.Context, ...string) (string, error) {
			return "containerd github.com/containerd/containerd 1.4.13~ds1 x", nil
		}
	}, failure, "containerd", "1.4.13", "1.6 or later", nil},
	{
		"not told", func(_ *doctor, f map[string]string) {
			f["etc/containerd/config.toml"] = "version = 2\n"
			f["run/containerd-erofsd/containerd-erofsd-grpc.sock"] = ""
		},
		failure, "containerd", "says nothing of the snapshotter", "containerd config migrate), then add this",
		[]string{"CRI"},
	},
	{"not told and not there", func(_ *doctor, f map[string]string) { delete(f, "etc/containerd/config.toml") }, note, "containerd", "says nothing", `io.containerd.cri.v1.images`, []string{"CRI"}},
	{"another socket", func(d *doctor, _ map[string]string) { d.snapshotter = "/run/other.sock" }, failure, "containerd", "and not at /run/other.sock", "restart containerd", []string{"CRI"}},
	{"no TOML", func(_ *doctor, f map[string]string) { f["etc/containerd/config.toml"] = "version = [" }, failure, "containerd", "/etc/containerd/config.toml", "config dump", nil},
	{
		"no annotations", func(_ *doctor, f map[string]string) {
			replace(f, "etc/containerd/config.toml", "disable_snapshot_annotations = false\n", "")
		},
		warning, "CRI", "does not say by which reference", "disable_snapshot_annotations = false", nil,
	},
	{"discarded", func(_ *doctor, f map[string]string) {
		replace(f, "etc/containerd/config.toml", "disable_snapshot_annotations = false\n", "disable_snapshot_annotations = false\ndiscard_unpacked_layers = true\n")
	}, warning, "CRI", "drops layers", "discard_unpacked_layers = false", nil},
	{"no exports", func(_ *doctor, f map[string]string) {
		replace(f, "etc/containerd/config.toml", `root = "/var/lib/containerd/io.containerd.snapshotter.v1.erofsd"`, "")
	}, warning, "CRI", "does not see how full", "[proxy_plugins.erofsd.exports]", nil},
	{
		"others only", func(_ *doctor, f map[string]string) {
			replace(f, "etc/containerd/config.toml", "snapshotter = \"erofsd\"\ndisable", "disable")
		},
		note, "CRI", "Kubernetes uses the snapshotter overlayfs", "", nil,
	},
	{"version 2 in containerd 2", func(_ *doctor, f map[string]string) {
		text, _ := configs.File("containerd/config-v2.toml")
		f["etc/containerd/config.toml"] = string(text)
	}, failure, "CRI", "containerd 2 reads version 2", "config-v3.toml", nil},
	{"runtime of version 2 in containerd 2", func(_ *doctor, f map[string]string) {
		text, _ := configs.File("containerd/runtime-v2.toml")
		f["etc/containerd/config.toml"] = string(text)
	}, failure, "CRI", "containerd 2 reads version 2", "runtime-v3.toml", nil},
	{"imported by containerd 1", func(d *doctor, f map[string]string) {
		f["etc/containerd/config.toml"] = "version = 2\nimports = [\"conf.d/*.toml\"]\n[plugins.\"io.containerd.grpc.v1.cri\"]\nsandbox_image = \"x\"\n"
		text, _ := configs.File("containerd/config-v2.toml")
		f["etc/containerd/conf.d/erofsd.toml"] = string(text)
		d.run = func(context.Context, ...string) (string, error) {
			return "containerd github.com/containerd/containerd 1.7.24 x", nil
		}
	}, warning, "containerd", "in place of all that /etc/containerd/config.toml says", "one file", nil},
}

func replace(files map[string]string, name, old, by string) {
	if !strings.Contains(files[name], old) {
		panic(name + " does not have " + old)
	}
	files[name] = strings.ReplaceAll(files[name], old, by)
}

// TestDoctorFinds: each illness is found, with its remedy, and nothing else is.
func TestDoctorFinds(t *testing.T) {
	for _, test := range illnesses {
		t.Run(test.name, func(t *testing.T) {
			files, d := healthy(t), newDoctor(t)
			test.spoil(d, files)
			d.write(t, files)
			if err := d.examine(t.Context()); err != nil {
				t.Fatal(err)
			}
			i := slices.IndexFunc(d.findings, func(f finding) bool {
				return f.Check == test.check && f.Level == test.level && strings.Contains(f.Found, test.found) && strings.Contains(f.Do, test.remedy)
			})
			if i < 0 {
				t.Fatalf("not found in %+v", d.findings)
			}
			for k, f := range d.findings {
				if k != i && (f.Level == failure || f.Level == warning) && f.Check != "sandbox" && f.Check != "cache" && (f.Check != "snapshotter" || test.name != "not told") {
					t.Errorf("also: %+v", f)
				}
				if slices.Contains(test.without, f.Check) {
					t.Errorf("too much: %+v", f)
				}
			}
			if (test.level == failure) != (d.worst() == failure) {
				t.Errorf("the worst is %s", d.worst())
			}
		})
	}
}

// die leaves a socket at which nobody answers.
func (d *doctor) die(name string) {
	path := d.at(name)
	err := os.MkdirAll(filepath.Dir(path), 0o755)
	if err != nil {
		panic(err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		panic(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
}

// TestDoctorCache: file systems that cannot have the cache are refused by their kind.
func TestDoctorCache(t *testing.T) {
	d := newDoctor(t)
	d.host, d.root = "/", "/proc/erofsd"
	d.examineDisk()
	if len(d.findings) != 1 || d.findings[0].Level != failure || !strings.Contains(d.findings[0].Found, "/proc is on a file system (0x9fa0)") {
		t.Errorf("%+v", d.findings)
	}
}

// TestDoctorRegistry: a registry answers, refuses, or is none; no login is sent or shown.
func TestDoctorRegistry(t *testing.T) {
	date, status := "", http.StatusUnauthorized
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/v2/" || r.Header.Get("Authorization") != "" {
			t.Errorf("asked for %s with %q", r.URL.Path, r.Header.Get("Authorization"))
		}
		if date != "" {
			w.Header().Set("Date", date)
		}
		w.WriteHeader(status)
	}))
	defer s.Close()
	host := strings.TrimPrefix(s.URL, "http://")
	for _, test := range []struct {
		name, registry, date string
		status               int
		level                level
		check, found, remedy string
	}{
		{"answers", s.URL, "", http.StatusUnauthorized, fine, "registry", "answers after", ""},
		{"open", s.URL + "/", "", http.StatusOK, fine, "registry", "answers after", ""},
		{"clock", s.URL, "Mon, 02 Jan 2006 15:04:05 GMT", http.StatusOK, warning, "clock", "apart from that of", "timedatectl"},
		{"refuses", s.URL, "", http.StatusForbidden, warning, "registry", "403", "proxy"},
		{"none", s.URL, "", http.StatusNotFound, failure, "registry", "404", "whether it is a registry"},
		{"no TLS", host, "", http.StatusOK, failure, "registry", "HTTP response to HTTPS", "backend.plain_http"},
		{"nobody", "http://127.0.0.1:1", "", http.StatusOK, failure, "registry", "connection refused", "port"},
		{"login", "http://user:s3cret@" + host, "", http.StatusOK, failure, "registry", "no registry's address", "without a login"},
		{"nonsense", "http://%zz", "", http.StatusOK, failure, "registry", "no registry's address", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			d := newDoctor(t)
			date, status = test.date, test.status
			d.examineRegistry(t.Context(), test.registry)
			d.client.CloseIdleConnections()
			if len(d.findings) == 0 {
				t.Fatal("nothing was found")
			}
			if f := d.findings[0]; f.Level != test.level || f.Check != test.check || !strings.Contains(f.Found, test.found) || !strings.Contains(f.Do, test.remedy) {
				t.Errorf("%+v", f)
			}
			for _, f := range d.findings {
				if strings.Contains(f.Found+f.Do, "s3cret") {
					t.Errorf("shows a login: %+v", f)
				}
			}
		})
	}
}

// TestUnsafeKernels: the releases of docs/operations.md.
func TestUnsafeKernels(t *testing.T) {
	for _, test := range []struct {
		version              string
		fanotify, cachefiles bool // safe
	}{
		{"6.1.146", false, false},
		{"6.1.147", false, true},
		{"6.12.39", false, false},
		{"6.12.40", false, true},
		{"6.18.29", false, true},
		{"6.18.30", true, true},
		{"6.19.1", true, true},
		{"7.0.6", false, true},
		{"7.0.7", true, true},
	} {
		v, err := kernel.ParseVersion(test.version)
		if err != nil {
			t.Fatal(err)
		}
		if unsafeFanotify(v) == "" != test.fanotify || unsafeCachefiles(v) == "" != test.cachefiles {
			t.Errorf("%s: %q, %q", test.version, unsafeFanotify(v), unsafeCachefiles(v))
		}
	}
}

// TestDoctorHere runs it on this machine.
func TestDoctorHere(t *testing.T) {
	testenv.Root(t)
	dir := t.TempDir()
	var out bytes.Buffer
	c := command()
	c.Writer = &out
	err := c.Run(t.Context(), []string{"erofsctl", "doctor", "--json", "--root", filepath.Join(dir, "not", "there"), "--containerd-config", filepath.Join(dir, "none.toml")})
	var told struct {
		Worst    level     `json:"worst"`
		Findings []finding `json:"findings"`
	}
	if jerr := json.Unmarshal(out.Bytes(), &told); jerr != nil {
		t.Fatalf("%v: %s", jerr, out.String())
	}
	if (err != nil) != (told.Worst == failure) {
		t.Errorf("the worst is %s, the status %v", told.Worst, err)
	}
	for _, want := range []string{"fanotify", "cachefiles", "sandbox", "overlayfs", "cache", "clock", "erofsd", "snapshotter", "containerd"} {
		if !slices.ContainsFunc(told.Findings, func(f finding) bool { return f.Check == want }) {
			t.Errorf("nothing of %s in %s", want, out.String())
		}
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		t.Errorf("left over: %v, %v", entries, err)
	}
}
