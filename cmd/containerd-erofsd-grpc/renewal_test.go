package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/erofsd/erofsd/internal/testenv"
	"github.com/erofsd/erofsd/kernel-tests/regserver"
)

// A guardedRegistry wants tokens, which its token service gives for a password. Both can be
// changed; then old ones are refused. Without a password everybody may read.
type guardedRegistry struct {
	next http.Handler

	mu       sync.Mutex
	password string
	issued   int // tokens for the password
	refused  int // requests for blobs, and for tokens with another password
}

func (g *guardedRegistry) token() string { return "token-for-" + g.password }

func (g *guardedRegistry) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	g.mu.Lock()
	token := r.Header.Get("Authorization") == "Bearer "+g.token()
	user, password, _ := r.BasicAuth()
	login := user == "anna" && password == g.password
	switch {
	case r.URL.Path == "/token" && login:
		g.issued++
		json.NewEncoder(w).Encode(map[string]string{"token": g.token()})
	case r.URL.Path == "/token":
		g.refused++
		w.WriteHeader(http.StatusUnauthorized)
	case g.password != "" && !token:
		g.refused++
		w.Header().Set("WWW-Authenticate", `Bearer realm="http://`+r.Host+`/token",service="test",scope="repository:team/app:pull"`)
		w.WriteHeader(http.StatusUnauthorized)
	default:
		g.mu.Unlock()
		g.next.ServeHTTP(w, r)
		return
	}
	g.mu.Unlock()
}

func (g *guardedRegistry) set(password string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.password = password
}

func (g *guardedRegistry) tokens() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.issued
}

// A loginWorld is a rig with an image in a registry that wants a login, which a plugin of
// the kubelet's knows, behind a mirror that has nothing.
type loginWorld struct {
	*rig
	registry  *guardedRegistry
	reference string
	outside   string // a directory that the rig does not write to
	tree      testenv.Tree
	mirror    struct {
		sync.Mutex
		asked  int
		logins int
	}
}

func newLoginWorld(t *testing.T) *loginWorld {
	t.Helper()
	w := &loginWorld{rig: newRig(t), outside: t.TempDir(), tree: testenv.LoadTree(t, "tree.jsonl")}
	blobs := filepath.Join(w.outside, "registry", "blobs")
	if err := os.MkdirAll(blobs, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(blobs, os.DirFS(filepath.Join(testenv.Fixtures(t), "sha256-64k", "blobs"))); err != nil {
		t.Fatal(err)
	}
	reg, err := regserver.New(filepath.Dir(blobs))
	if err != nil {
		t.Fatal(err)
	}
	w.registry = &guardedRegistry{next: reg}
	guarded := httptest.NewServer(w.registry)
	mirror := httptest.NewTLSServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		w.mirror.Lock()
		defer w.mirror.Unlock()
		w.mirror.asked++
		if r.Header.Get("Authorization") != "" {
			w.mirror.logins++
		}
		rw.WriteHeader(http.StatusNotFound)
	}))
	t.Cleanup(func() {
		guarded.Close()
		mirror.Close()
		if err := reg.Close(); err != nil {
			t.Error(err)
		}
	})
	host := strings.TrimPrefix(guarded.URL, "http://")
	w.reference = host + "/team/app:1"
	w.configure(t, host, mirror)
	return w
}

// configure writes everything that the program reads.
func (w *loginWorld) configure(t *testing.T, host string, mirror *httptest.Server) {
	t.Helper()
	hosts := filepath.Join(w.outside, "certs.d", host)
	text, err := os.ReadFile(w.config)
	if err != nil {
		t.Fatal(err)
	}
	config := strings.NewReplacer(`"--rlimit-nofile"`, `"--no-completion", "--rlimit-nofile"`).Replace(string(text)) +
		strings.NewReplacer("OUT", w.outside, "HOST", host).Replace(`
[log]
level = "debug"
[credentials]
providers = ["docker", "kubelet"]
kubelet = {config = "OUT/plugins/config.yaml", plugins = "OUT/plugins"}
[[backends]]
images = ["HOST/team"]
hosts_dir = "OUT/certs.d"
`)
	for name, text := range map[string]string{
		w.config:                           config,
		filepath.Join(hosts, "hosts.toml"): fmt.Sprintf("server = \"http://%s\"\n[host.%q]\ncapabilities = [\"pull\"]\nca = \"ca.pem\"\n", host, mirror.URL),
		filepath.Join(hosts, "ca.pem"):     string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: mirror.Certificate().Raw})),
		filepath.Join(w.outside, "plugins", "config.yaml"): `{apiVersion: kubelet.config.k8s.io/v1, kind: CredentialProviderConfig, providers: [
			{name: plugin, apiVersion: credentialprovider.kubelet.k8s.io/v1, matchImages: ["127.0.0.1:` + strings.Split(host, ":")[1] + `"], defaultCacheDuration: 1h}]}`,
		filepath.Join(w.outside, "plugins", "plugin"): "#!/bin/sh\ncat " + w.outside + "/answer.json\n",
	} {
		if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, []byte(text), 0o755)); err != nil {
			t.Fatal(err)
		}
	}
}

// login is what the plugin says from now on.
func (w *loginWorld) login(t *testing.T, password string) {
	t.Helper()
	text, err := json.Marshal(map[string]any{
		"kind": "CredentialProviderResponse", "apiVersion": "credentialprovider.kubelet.k8s.io/v1", "cacheKeyType": "Registry",
		"auth": map[string]any{strings.Split(w.reference, "/")[0]: map[string]string{"username": "anna", "password": password}},
	})
	if err == nil {
		err = os.WriteFile(filepath.Join(w.outside, "answer.json"), text, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// pull does what containerd does with the image's bootstrap layer.
func (w *loginWorld) pull(t *testing.T, sn snapshots.Snapshotter) (top string) {
	t.Helper()
	top = "sha256:bootstrap"
	labels := snapshots.WithLabels(map[string]string{
		snapshots.LabelSnapshotRef: top, "containerd.io/snapshot/nydus-bootstrap": "true", "containerd.io/snapshot/cri.image-ref": w.reference,
	})
	mounts, err := sn.Prepare(t.Context(), "extract", "", labels)
	if err != nil {
		t.Fatal(err)
	}
	boot, err := os.ReadFile(filepath.Join(testenv.Fixtures(t), "sha256-64k", "image.boot"))
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(mounts[0].Source, "image")
	if err := errors.Join(os.Mkdir(dir, 0o755), os.WriteFile(filepath.Join(dir, "image.boot"), boot, 0o600)); err != nil {
		t.Fatal(err)
	}
	if err := sn.Commit(t.Context(), top, "extract", labels); err != nil {
		t.Fatal(err)
	}
	return top
}

// run mounts a container of the image and returns where.
func (w *loginWorld) run(t *testing.T, sn snapshots.Snapshotter, key, top string) (dir string, end func()) {
	t.Helper()
	mounts, err := sn.Prepare(t.Context(), key, top)
	if err != nil {
		t.Fatalf("%v; the log:\n%s", err, w.log.String())
	}
	dir = t.TempDir()
	if err := mount.All(mounts, dir); err != nil {
		t.Fatalf("%+v: %v", mounts, err)
	}
	end = sync.OnceFunc(func() {
		if err := mount.UnmountAll(dir, 0); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(end)
	return dir, end
}

// read reads a file of the image, and again while that fails, for as long as a login may be
// on its way. A wrong byte is none too many.
func (w *loginWorld) read(t *testing.T, dir, name string) (failures int) {
	t.Helper()
	want := w.tree[name].SHA256
	for end := time.Now().Add(patienceOfTest); ; failures++ {
		p, err := os.ReadFile(filepath.Join(dir, name))
		if err == nil {
			if got := fmt.Sprintf("%x", sha256.Sum256(p)); got != want {
				t.Errorf("%s has digest %s, want %q", name, got, want)
			}
			return failures
		}
		if !errors.Is(err, syscall.EIO) || time.Now().After(end) {
			t.Fatalf("%v; the log:\n%s", err, w.log.String())
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// nowhere looks for logins in everything that was written.
func (w *loginWorld) nowhere(t *testing.T) {
	t.Helper()
	secrets := [][]byte{[]byte("hunter2"), []byte(base64.StdEncoding.EncodeToString([]byte("anna:hunter2"))[:12])}
	find := func(where string, text []byte) {
		for _, s := range secrets {
			if bytes.Contains(text, s) {
				t.Errorf("%s has a login", where)
			}
		}
	}
	find("the log", []byte(w.log.String()))
	files := 0
	err := filepath.WalkDir(w.dir, func(name string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() && (name == w.bin || e.Name() == "mnt") || !e.Type().IsRegular() {
			if e != nil && e.IsDir() && (name == w.bin || e.Name() == "mnt") {
				return fs.SkipDir
			}
			return err
		}
		files++
		find("the name of "+name, []byte(name))
		text, err := os.ReadFile(name)
		find(name, text)
		return err
	})
	if err != nil || files < 6 {
		t.Errorf("%d files, %v", files, err)
	}
	worker, keeper := w.daemon(t)
	for _, pid := range []int{worker, keeper, w.cmd.Process.Pid} {
		for _, name := range []string{"cmdline", "environ", "mountinfo"} {
			file := fmt.Sprintf("/proc/%d/%s", pid, name)
			text, err := os.ReadFile(file)
			if err != nil {
				t.Error(err)
			}
			find(file, text)
		}
	}
}

// TestLogins reads an image whose registry wants a login, while the password changes, and
// the program and the daemon are killed. No login is written anywhere.
func TestLogins(t *testing.T) {
	for _, policy := range []string{recoverFailover, recoverRestart} {
		t.Run(policy, func(t *testing.T) { logins(t, policy) })
	}
}

func logins(t *testing.T, policy string) {
	w := newLoginWorld(t)
	w.rig.configure(t, fmt.Sprintf("recover_policy = %q", policy))
	w.registry.set("hunter2-first")
	w.login(t, "hunter2-first")
	w.start(t)
	sn := w.snapshots(t)
	top := w.pull(t, sn)
	dir, end := w.run(t, sn, "c", top)
	if n := w.read(t, dir, "dup/a"); n != 0 || w.registry.tokens() != 1 {
		t.Errorf("%d failures, %d tokens; the log:\n%s", n, w.registry.tokens(), w.log.String())
	}
	w.mirror.Lock()
	if w.mirror.asked == 0 || w.mirror.logins > 0 {
		t.Errorf("the mirror was asked %d times, with %d logins", w.mirror.asked, w.mirror.logins)
	}
	w.mirror.Unlock()

	// The plugin still says what it said an hour ago; only the refusal tells.
	w.registry.set("hunter2-second")
	w.login(t, "hunter2-second")
	t.Logf("%d reads failed until the new login was there", w.read(t, dir, "big/rand-2m"))
	if n := w.registry.tokens(); n != 2 {
		t.Errorf("%d tokens for the passwords, want 2", n)
	}

	// Killed, it remembers nothing: it asks again.
	w.stop(t, syscall.SIGKILL)
	w.registry.set("hunter2-third")
	w.login(t, "hunter2-third")
	w.start(t)
	w.read(t, dir, "sizes/text-1048577")
	end()

	// A daemon that died has no login: the next one goes on with what the last one was told
	// last, or is told when the image is recovered.
	worker, keeper := w.daemon(t)
	for _, pid := range []int{keeper, worker} {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			t.Fatal(err)
		}
	}
	if next, _ := w.daemon(t); next == worker {
		t.Errorf("process %d answers after its death", worker)
	}
	dir, end = w.run(t, sn, "d", top)
	w.read(t, dir, "big/text-3m")
	end()
	w.nowhere(t)
	for _, key := range []string{"c", "d", top} {
		if err := sn.Remove(t.Context(), key); err != nil {
			t.Error(err)
		}
	}
	if err := sn.(snapshots.Cleaner).Cleanup(t.Context()); err != nil {
		t.Error(err)
	}
}
