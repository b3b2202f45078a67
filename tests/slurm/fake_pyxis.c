/* Takes pyxis' options of srun, so that --container-* is known on a machine without enroot. The task runs on the bare
 * node and finds the values as FAKE_PYXIS_IMAGE, _MOUNTS, ... for a test to look at.
 * Build: cc -shared -fPIC -o fake_pyxis.so fake_pyxis.c */
#include <slurm/spank.h>
#include <string.h>

SPANK_PLUGIN(fake_pyxis, 1)

enum { IMAGE, MOUNTS, WORKDIR, NAME, WRITABLE, MOUNT_HOME, NO_MOUNT_HOME, ENV, COUNT };
static const char *key[COUNT] = {"IMAGE", "MOUNTS", "WORKDIR", "NAME", "WRITABLE", "MOUNT_HOME", "NO_MOUNT_HOME", "ENV"};
static char value[COUNT][4096];

static int remember(int which, const char *argument, int remote)
{
	(void)remote;
	strncpy(value[which], argument ? argument : "1", sizeof value[which] - 1);
	return 0;
}

#define OPTION(name, argument, which) \
	{ (char *)name, (char *)argument, (char *)"(fake pyxis)", (argument) != 0, which, remember }
static struct spank_option options[] = {
	OPTION("container-image", "IMAGE", IMAGE),
	OPTION("container-mounts", "MOUNTS", MOUNTS),
	OPTION("container-workdir", "PATH", WORKDIR),
	OPTION("container-name", "NAME", NAME),
	OPTION("container-writable", 0, WRITABLE),
	OPTION("container-mount-home", 0, MOUNT_HOME),
	OPTION("no-container-mount-home", 0, NO_MOUNT_HOME),
	OPTION("container-env", "NAMES", ENV),
	SPANK_OPTIONS_TABLE_END,
};

int slurm_spank_init(spank_t spank, int count, char **arguments)
{
	(void)count;
	(void)arguments;
	for (int i = 0; options[i].name; i++)
		if (spank_option_register(spank, &options[i]) != ESPANK_SUCCESS)
			return -1;
	return 0;
}

int slurm_spank_task_init(spank_t spank, int count, char **arguments)
{
	char name[64];
	(void)count;
	(void)arguments;
	for (int i = 0; i < COUNT; i++)
		if (value[i][0]) {
			strcpy(name, "FAKE_PYXIS_");
			strcat(name, key[i]);
			spank_setenv(spank, name, value[i], 1);
		}
	return 0;
}
