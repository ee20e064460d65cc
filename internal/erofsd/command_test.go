package erofsd

import (
	"encoding/base64"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/erofsd/erofsd/internal/config"
	"github.com/erofsd/erofsd/internal/daemon"
)

// parsed is the command of a line, which must be right.
func parsed(t *testing.T, line string, environ ...string) *command {
	t.Helper()
	c, err := parse(strings.Fields(line), environ)
	if err != nil {
		t.Fatalf("%s: %v", line, err)
	}
	return c
}

func TestDefaults(t *testing.T) {
	o := parsed(t, "erofsd").options()
	want := daemon.Options{
		Root: "/var/lib/erofsd", Transport: "auto", FillTimeout: time.Minute, FillThreads: 1024, Default: config.Default().Image,
		Sandbox: daemon.SandboxAuto,
	}
	if d := cmp.Diff(want, o, cmpopts.IgnoreUnexported(o)); d != "" {
		t.Error(d)
	}
	for line, socket := range map[string]string{
		"erofsd":                                     "/run/erofsd/erofsd.sock",
		"erofsd singleton":                           "/run/erofsd/erofsd.sock",
		"/usr/bin/nydusd singleton":                  "",
		"nydusd-2.3 singleton -A /s":                 "/s",
		"nydusd singleton --socket=/s":               "/s",
		"erofsd -A/s":                                "/s",
		"erofsd --apisock /s --id a --supervisor /x": "/s",
	} {
		if got := parsed(t, line).config.Daemon.Socket; got != socket {
			t.Errorf("%s: socket %q, want %q", line, got, socket)
		}
	}
}

// TestIsCalled: by which command lines another program is erofsd.
func TestIsCalled(t *testing.T) {
	for line, want := range map[string]bool{
		"erofsd":                          true,
		"/usr/local/bin/erofsd --root /r": true,
		"erofsd-mount unmount /m":         true,
		"erofsd-mounter":                  true,
		"erofsd-guard /cache":             true,
		"/proc/1/exe erofsd-guard /cache": true,
		"containerd-erofsd-grpc":          false,
		"/usr/local/bin/containerd-erofsd-grpc --config erofsd": false,
		"containerd-nydus-grpc --root erofsd-guard":             false,
		"erofsd-starter 3 /erofsd erofsd":                       false,
	} {
		if got := IsCalled(strings.Fields(line)); got != want {
			t.Errorf("%s: %v", line, got)
		}
	}
}

// TestForms: every way in which clap and flag take an option.
func TestForms(t *testing.T) {
	for _, line := range []string{
		"erofsd singleton --fscache /c --apisock /s --log-level warn --log-file /l --fscache-threads 7 --id i --supervisor /u --upgrade",
		"erofsd --fscache /c --apisock /s --log-level warn singleton --log-file /l --fscache-threads 7 --id i --supervisor /u --upgrade",
		"erofsd --fscache=/c -A /s -l warn -L /l --fscache-threads=7 --id=i --supervisor=/u --upgrade singleton",
		"erofsd singleton -F/c -A/s -lwarn -L/l --upgrade --fscache-threads 7 --supervisor /u --id i",
		"erofsd -F=/c -A=/s -l=warn -L=/l singleton --upgrade --fscache-threads 7 --supervisor /u --id i",
	} {
		c := parsed(t, line)
		o := c.options()
		got := []any{c.single, o.Fscache, c.config.Daemon.Socket, c.config.Log.Level, c.config.Log.File, o.FillThreads, o.Nydusd.ID, o.Nydusd.Supervisor, o.Nydusd.Upgrade}
		want := []any{true, "/c", "/s", "warn", "/l", 7, "i", "/u", true}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("%s: %s", line, d)
		}
	}
}

func TestOptions(t *testing.T) {
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	tests := map[string]func(*command) (got, want any){
		"erofsd --root /r":                            func(c *command) (any, any) { return c.options().Root, "/r" },
		"erofsd --transport fanotify":                 func(c *command) (any, any) { return c.options().Transport, daemon.Fanotify },
		"erofsd --no-completion":                      func(c *command) (any, any) { return c.options().NoCompletion, true },
		"erofsd --fill-timeout 5s":                    func(c *command) (any, any) { return c.options().FillTimeout, 5 * time.Second },
		"erofsd --cache-high 10GiB":                   func(c *command) (any, any) { return c.options().High, int64(10 << 30) },
		"erofsd --cache-high 2GiB --cache-low 5":      func(c *command) (any, any) { return c.options().Low, int64(5) },
		"erofsd --log-rotation-size 3":                func(c *command) (any, any) { return c.config.Log.RotationSize, config.Size(3 << 20) },
		"erofsd --rlimit-nofile 0":                    func(c *command) (any, any) { return c.config.Daemon.RlimitNofile, 0 },
		"erofsd --fscache cache":                      func(c *command) (any, any) { return c.options().Fscache, filepath.Join(wd, "cache") },
		"erofsd --fscache-tag t":                      func(c *command) (any, any) { return c.options().FscacheTag, "t" },
		"erofsd --handover":                           func(c *command) (any, any) { return c.options().Handover, true },
		"erofsd --log-level off":                      func(c *command) (any, any) { return c.config.Log.Level, "off" },
		"erofsd --fscache /c":                         func(c *command) (any, any) { return c.options().Transport, daemon.Auto },
		"erofsd singleton --fscache /c":               func(c *command) (any, any) { return c.options().Transport, daemon.Cachefiles },
		"erofsd singleton":                            func(c *command) (any, any) { return c.options().Transport, daemon.Auto },
		"erofsd singleton -F /c --transport fanotify": func(c *command) (any, any) { return c.options().Transport, daemon.Fanotify },
		"erofsd singleton --fscache /d":               func(c *command) (any, any) { return c.options().Hasty, false },
		"erofsd singleton --fscache /d -A /s":         func(c *command) (any, any) { return c.options().Hasty, true },
		"nydusd singleton --fscache /d":               func(c *command) (any, any) { return c.options().Hasty, true },
		"erofsd -A /s":                                func(c *command) (any, any) { return c.options().Hasty, false },
	}
	for line, field := range tests {
		if got, want := field(parsed(t, line)); got != want {
			t.Errorf("%s: %v, want %v", line, got, want)
		}
	}
}

// write makes a file and returns its name.
func write(t *testing.T, name, text string) string {
	t.Helper()
	name = filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

func TestFlagsWinOverFile(t *testing.T) {
	file := write(t, "erofsd.toml", `
[daemon]
root = "/file"
fill_timeout = "7s"
[log]
level = "error"
[metrics]
address = "127.0.0.1:9100"
[cache]
high = "1GiB"
`)
	c := parsed(t, "erofsd --root /flag --config "+file+" -l debug")
	o := c.options()
	got := []any{o.Root, o.FillTimeout, c.config.Log.Level, o.Nydusd.Metrics, o.High}
	if d := cmp.Diff([]any{"/flag", 7 * time.Second, "debug", "127.0.0.1:9100", int64(1 << 30)}, got); d != "" {
		t.Error(d)
	}
	// A flag that does not go with the file is a wrong command line.
	_, err := parse([]string{"erofsd", "--config", file, "--cache-low", "2GiB"}, nil)
	if _, usage := err.(usageError); !usage || !strings.Contains(err.Error(), "cache.low") {
		t.Errorf("cache-low above the file's high: %v", err)
	}
}

// entries is nydusd's configuration with a registry and a directory.
const entries = `{"ignored":1,"blobs":[
 {"type":"bootstrap","id":"a","domain_id":"d","config":{"backend_type":"registry","backend_config":{"host":"h","repo":"r"%s},"cache_type":"fscache","cache_config":{"work_dir":"/w"},"metadata_path":"/b"}},
 {"type":"bootstrap","id":"b","config_v2":{"version":2,"backend":{"type":"localfs","localfs":{"dir":"/x"}},"cache":{"type":"fscache","fscache":{"work_dir":"/w"}},"metadata_path":"/b"}}]}`

func TestNydusdConfiguration(t *testing.T) {
	file := write(t, "nydusd.json", fmt.Sprintf(entries, ""))
	c := parsed(t, "nydusd singleton --fscache /c --config "+file)
	var ids []string
	for _, e := range c.options().Nydusd.Entries {
		ids = append(ids, e.DomainID+"/"+e.ID)
	}
	if d := cmp.Diff([]string{"d/a", "/b"}, ids); d != "" {
		t.Error(d)
	}
	if other := parsed(t, "nydusd singleton -C "+write(t, "other.json", `{"device":{}}`)); len(other.nydusd.Entries) != 0 {
		t.Errorf("a configuration without blobs has %d", len(other.nydusd.Entries))
	}
}

func TestEnvironment(t *testing.T) {
	auth := base64.StdEncoding.EncodeToString([]byte("user:sesame"))
	own := base64.StdEncoding.EncodeToString([]byte("own:password"))
	environ := []string{"IMAGE_PULL_AUTH=" + auth, "NYDUS_HEADER_X-Team=sesame", "NYDUS_HEADER_X-Empty=", "HTTP_PROXY=http://p", "RUST_BACKTRACE=1"}
	entry := func(more string) []config.BlobEntry {
		file := write(t, "nydusd.json", fmt.Sprintf(entries, more))
		nydusd := parsed(t, "nydusd singleton --config "+file, environ...).options().Nydusd
		for i := range nydusd.Entries {
			nydusd.Adjust(&nydusd.Entries[i].Image)
		}
		return nydusd.Entries
	}
	without, with := entry("")[0].Image.Backend.Registry, entry(`,"auth":"` + own + `"`)[0].Image.Backend.Registry
	if got := without.Auth.Reveal(); got != auth {
		t.Errorf("an entry without auth has %q", got)
	}
	if got := with.Auth.Reveal(); got != own {
		t.Errorf("an entry with auth has %q", got)
	}
	if got := with.Headers["X-Team"].Reveal(); got != "sesame" || len(with.Headers) != 1 {
		t.Errorf("headers %v", with.Headers)
	}
	for _, tc := range []struct{ spec, given, want string }{
		{"off", "info", "off"},
		{"error", "debug", "error"},
		{"TRACE", "info", "info"},
		{"hyper=debug,warn", "info", "warn"},
		{"hyper=debug", "info", "info"},
		{"warn/regex", "info", "warn"},
		{"", "info", "info"},
	} {
		c := parsed(t, "erofsd -l "+tc.given, "RUST_LOG="+tc.spec)
		if c.config.Log.Level != tc.want {
			t.Errorf("RUST_LOG=%s and --log-level %s: %s, want %s", tc.spec, tc.given, c.config.Log.Level, tc.want)
		}
		if warned := len(c.warnings) > 0; warned != strings.ContainsAny(tc.spec, "=/") {
			t.Errorf("RUST_LOG=%s: warnings %q", tc.spec, c.warnings)
		}
	}
}

// TestHeadersOfEveryBackend: an image's own headers win, and nothing that is shared changes.
func TestHeadersOfEveryBackend(t *testing.T) {
	h := func() config.HTTP { return config.HTTP{Headers: map[string]config.Secret{"A": "own"}} }
	e := environment{headers: map[string]config.Secret{"A": "given", "B": "given"}}
	for name, b := range map[string]config.Backend{
		"registry":   {Registry: &config.Registry{HTTP: h()}},
		"s3":         {S3: &config.S3{HTTP: h()}},
		"oss":        {OSS: &config.OSS{HTTP: h()}},
		"http-proxy": {HTTPProxy: &config.HTTPProxy{HTTP: h()}},
	} {
		part := func(b config.Backend) config.HTTP {
			switch {
			case b.Registry != nil:
				return b.Registry.HTTP
			case b.S3 != nil:
				return b.S3.HTTP
			case b.OSS != nil:
				return b.OSS.HTTP
			}
			return b.HTTPProxy.HTTP
		}
		image := config.Image{Backend: b}
		e.adjust(&image)
		if got := part(image.Backend).Headers; got["A"].Reveal() != "own" || got["B"].Reveal() != "given" || len(got) != 2 {
			t.Errorf("%s: %d headers, A %q, B %q", name, len(got), got["A"].Reveal(), got["B"].Reveal())
		}
		if got := part(b).Headers; len(got) != 1 {
			t.Errorf("%s: the backend that was given changed", name)
		}
	}
}

func TestDescriptors(t *testing.T) {
	tests := []struct {
		want, fileMax, present uint64
		given                  bool
		limit                  uint64
	}{
		{1000000, 1 << 40, 1024, false, 1000000},
		{1000000, 116384, 1024, false, 100000},
		{1000000, 116384, 200000, false, 200000},
		{1000000, 1 << 40, 2000000, false, 2000000}, // the default lowers nothing
		{1000000, 1 << 40, 2000000, true, 1000000},
		{5000000, 1 << 40, 1024, true, 1000000},
		{512, 1 << 40, 1024, true, 512},
	}
	for _, tc := range tests {
		if got, err := descriptors(tc.want, tc.fileMax, tc.present, tc.given); err != nil || got != tc.limit {
			t.Errorf("%+v: %d, %v", tc, got, err)
		}
	}
	if _, err := descriptors(1000000, 32767, 1024, false); err == nil || !strings.Contains(err.Error(), "fs.file-max sysctl is too low") {
		t.Errorf("a machine with few descriptors: %v", err)
	}
	if err := setFileLimit(0, true, slog.New(slog.DiscardHandler)); err != nil {
		t.Errorf("a limit that is left alone: %v", err)
	}
}
